"""Hosts that are not like SD3: masked text without a pooled embedding, embedded guidance, packed latents, rows that
cannot be joined, pictures that are no squares; from calibration to a picture.
"""

from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.trajectories import Calibration
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError
from mlxquant.evaluation.layer_report import layer_report
from mlxquant.files.checked import read_tensors, write_tensors
from mlxquant.layers.attention import QuantizedAttention
from mlxquant.pipeline.samples import open_folder
from mlxquant.progress import silent
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sampling.guidance import Guidance, guided

from support.adapter_contract import AdapterContract
from support.other_host import LONGEST, Host

HOSTS = {
    "masked": {},
    "null": {"null": True},
    "packed": {"packed": True, "guidance": "embedded"},
    "alone": {"alone": True, "packed": True},
    "unguided": {"guidance": "none", "packed": True},
    "alone-embedded": {"alone": True, "guidance": "embedded"},
}


class OtherHost(AdapterContract):
    """What every adapter must keep; where rows are alone no batch is run."""

    OPTIONS: ClassVar[dict] = {}

    @classmethod
    def make_adapter(cls):
        return Host(**cls.OPTIONS)

    def whole(self, adapter, latent, conditioning, t):
        state = {"latent": adapter.pack(latent), **conditioning, "t": t}
        for stage in adapter.stages:
            state = stage.run(state)
        return adapter.unpack(state["velocity"], adapter.latent_shape)


class TestMasked(OtherHost):
    pass


class TestPackedAndEmbedded(OtherHost):
    OPTIONS: ClassVar[dict] = {"packed": True, "guidance": "embedded"}


@pytest.fixture(params=HOSTS, scope="module")
def host(request):
    return Host(**HOSTS[request.param])


def psnr(image, reference):
    return -10 * np.log10(np.square(np.asarray(image) - reference).mean())


@pytest.mark.parametrize("recipe", ["gptq-w4a8", "rtn+softmax8-w4a8"])
def test_from_calibration_to_a_picture(host, recipe, tmp_path, monkeypatch):
    model, prompts = mq.Model(host), host.prompts("evaluation", 3)
    mq.calibrate(model, 4).save(tmp_path / "calib")
    calib = Calibration.load(tmp_path / "calib")
    assert calib.latents.shape == (3, 4, *host.latent_shape)
    assert calib.guidance == host.guiding()
    quantized = mq.quantize(model, calib, recipe)
    assert len(quantized.layers) == len(host.layers())
    exact, images = model.images(prompts), quantized.images(prompts)
    assert images.shape == (3, 32, 48, 3)
    assert 15 < psnr(images, exact) < 60
    monkeypatch.setattr("mlxquant.api.model.adapter_class", lambda name: Host)
    again = mq.QuantizedModel.load(quantized.save(tmp_path / "model"))
    np.testing.assert_array_equal(again.images(prompts), images)


def test_calibration_shows_what_the_sampler_asks(host, monkeypatch):
    """The very states, whatever the guidance and however rows are passed."""
    asked, run = [], Host.run
    monkeypatch.setattr(Host, "run", lambda self, state, sigma: asked.append((state, sigma)) or run(self, state, sigma))
    calib = mq.calibrate(mq.Model(host), host.batch, steps=2)
    drawn, (sigmas, states) = list(asked), calib.batches(host)
    assert len(states) == len(drawn) == 2 * (2 if host.alone and host.guidance == "classifier-free" else 1)
    for (state, at), sigma, again in zip(drawn, sigmas, states, strict=True):
        assert at == sigma
        assert state.keys() == again.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(np.array(again[key]), np.array(value), err_msg=key)


def test_rows_that_cannot_be_joined_never_are():
    """Not by the sampler, by calibration, by sensitivities or by learning."""
    host = Host(alone=True)
    model = mq.Model(host)
    model.images(host.prompts("evaluation", 3))
    calib = mq.calibrate(model, 3)
    assert calib.sides == 1
    learning = parse_recipe("adaround-w4a8")
    learning = replace(learning, learning=replace(learning.learning, iterations=2))
    for recipe in ("gptq-w4a8", "mixed-w4a16", learning):
        mq.quantize(model, calib, recipe)
    assert {rows for rows, _ in host.passes} == {1}
    assert len({tokens for _, tokens in host.passes}) > 1


def test_rows_that_are_alone_are_differentiated_alone():
    host = Host(alone=True)
    host.rows = 2
    with pytest.raises(AdapterError, match="found rows = 2; set it to 1"):
        host.guiding()


def test_padding_does_not_matter():
    host = Host()
    text = host.encode(["a tree", "fog"])
    latent = mx.random.normal((2, *host.latent_shape), key=mx.random.key(2))
    other = text.beside(tokens=mx.where(text["mask"][..., None], text["tokens"], -7.0))
    found, same = (np.array(host.velocity(latent, read, 0.4)) for read in (text, other))
    np.testing.assert_array_equal(found, same)
    short = Host(alone=True).velocity(latent[:1], text.take(slice(1)), 0.4)
    np.testing.assert_allclose(np.array(short), found[:1], atol=1e-5)
    assert text["mask"].sum(1).tolist() == [3, 2]
    assert text["mask"].shape[1] == LONGEST


def test_quantized_probabilities_of_padding_are_0():
    host = Host()
    model = mq.Model(host)
    quantized = mq.quantize(model, mq.calibrate(model, 2), "rtn+softmax4-w8a16").adapter
    assert all(isinstance(block.sdpa, QuantizedAttention) for block in quantized.module.blocks)
    text = host.encode(["a tree", "fog"])
    latent = mx.random.normal((2, *host.latent_shape), key=mx.random.key(2))
    other = text.beside(tokens=mx.where(text["mask"][..., None], text["tokens"], -7.0))
    found, same = (np.array(quantized.velocity(latent, read, 0.4)) for read in (text, other))
    np.testing.assert_array_equal(found, same)


def test_an_embedded_weight_reaches_the_model():
    host, prompts = Host(guidance="embedded"), Host().prompts("evaluation", 1)
    model = mq.Model(host)
    images = [model.images(prompts, cfg=cfg) for cfg in (None, 2.0, 6.0)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[1] - images[2]).max() > 1e-3
    assert {rows for rows, _ in host.passes} == {1}  # one side only


def test_a_negative_prompt_takes_the_place_of_the_models_own_other_side():
    for options in ({}, {"null": True}, {"alone": True}):
        model = mq.Model(Host(**options))
        prompts = model.adapter.prompts("evaluation", 2)
        plain, fog = model.images(prompts), model.images(prompts, negative="fog by night")
        assert np.abs(plain - fog).max() > 1e-3
        for blank in ("", "  "):
            np.testing.assert_array_equal(model.images(prompts, negative=blank), plain)
        calib = mq.calibrate(model, 2, negative="fog by night")
        assert (calib.facts["negative"], calib.guidance.negative) == ("fog by night", "fog by night")
        assert "negative" not in mq.calibrate(model, 2).facts
        _, states = calib.batches(model.adapter)
        words = model.adapter.encode(["fog by night"])["tokens"][0]
        assert mx.array_equal(states[2 if options.get("alone") else 0]["tokens"][-1], words)
        assert calib.renewed(model.adapter).facts == calib.facts
    two = mq.Model(Host(null=True)), mq.Model(Host())
    differs = np.abs(two[0].images(prompts) - two[1].images(prompts)).max()
    assert differs > 1e-3
    np.testing.assert_array_equal(two[0].images(prompts, negative="fog"), two[1].images(prompts, negative="fog"))


@pytest.mark.parametrize(
    ("options", "cfg", "message"),
    [
        ({"guidance": "embedded"}, None, "guidance embedded; leave it out"),
        ({"guidance": "none"}, None, "guidance none; leave it out"),
        ({}, 1.0, "a cfg weight of 1"),
    ],
)
def test_who_is_not_guided_refuses_a_negative_prompt(options, cfg, message, monkeypatch):
    monkeypatch.setattr(Host, "encode", lambda self, prompts: pytest.fail("encoded"))
    model = mq.Model(Host(**options))
    prompts = model.adapter.prompts("evaluation", 1)
    for verb in (
        lambda: model.images(prompts, cfg=cfg, negative="fog"),
        lambda: mq.calibrate(model, 1, cfg=cfg, negative="fog"),
        lambda: mq.compare(model, model, prompts, cfg=cfg, negative="fog"),
    ):
        with pytest.raises(AdapterError, match=message):
            verb()


def test_a_model_without_guidance_refuses_a_weight():
    model = mq.Model(Host(guidance="none"))
    with pytest.raises(AdapterError, match="no guidance, found a cfg weight of 3; leave it out"):
        model.images(model.adapter.prompts("evaluation", 1), cfg=3.0)


def test_pictures_have_the_size_that_was_asked_for(tmp_path):
    host = Host(packed=True)
    assert (host.size, host.latent_shape) == ((48, 32), (4, 6, 4))
    host.resize(64)
    assert (host.size, host.latent_shape) == ((64, 64), (8, 8, 4))
    square = mq.calibrate(mq.Model(host), 2, steps=2)
    square.save(tmp_path / "square")
    host.resize((32, 80))
    model = mq.Model(host)
    calib = mq.calibrate(model, 2, steps=2)
    assert calib.latents.shape == (2, 2, 10, 4, 4)
    assert calib.facts["latent_shape"] == [10, 4, 4]
    quantized = mq.quantize(model, calib, "rtn-w8a8")
    pair = mq.compare(model, quantized, host.prompts("evaluation", 2))
    assert pair.images["FP"].shape == (2, 80, 32, 3)
    assert Calibration.load(tmp_path / "square").latents.shape == (2, 2, 8, 8, 4)
    mq.quantize(model, Calibration.load(tmp_path / "square"), "rtn-w8a8")  # whose states have their own shape
    with pytest.raises(AdapterError, match="multiples of 16 pixels"):
        host.resize((40, 64))
    assert host.size == (32, 80)


def test_packed_latents_are_unpacked():
    host = Host(packed=True)
    latent = mx.random.normal((2, 6, 4, 4), key=mx.random.key(0))
    packed = host.pack(latent)
    assert packed.shape == (2, 6, 16)
    np.testing.assert_array_equal(np.array(host.unpack(packed, (6, 4, 4))), np.array(latent))
    text, seen = host.encode(["a", "b"]), []
    found = guided(
        lambda some, read, sigma: seen.append(some.shape) or host.velocity(some, read, sigma),
        latent,
        0.5,
        text,
        text,
        Guidance(2.0),
    )
    assert (seen, found.shape) == ([(4, 6, 4, 4)], latent.shape)


def test_a_conditioning_may_not_take_the_names_of_the_state():
    host = Host()
    latent, text = mx.zeros((1, *host.latent_shape)), host.encode(["a"])
    with pytest.raises(AdapterError, match=r"cannot have arrays named \['t'\]"):
        host.state(latent, text.beside(t=mx.zeros(1)), 0.5)


def test_trajectories_of_another_kind_of_guidance_are_refused():
    """The weights may be the same; what the model reads is not."""
    calib = mq.calibrate(mq.Model(Host()), 1, steps=1)
    for options, told in (({"guidance": "embedded"}, "has embedded"), ({"alone": True}, "has classifier-free, alone")):
        with pytest.raises(CalibrationError, match=f"of a model with guidance classifier-free; other-host {told}"):
            calib.batches(Host(**options))


@pytest.mark.parametrize(
    "change",
    [{"guidance": "half"}, {"guidance": 3}, {"negative": 3}, {"alone": 1}, {"cfg": -1}, {"cfg": 1, "negative": "fog"}],
)
def test_guidance_that_cannot_be_is_an_error_about_the_file(change, tmp_path):
    mq.calibrate(mq.Model(Host()), 1, steps=1).save(tmp_path / "calib")
    arrays, header = read_tensors(tmp_path / "calib", "calibration")
    write_tensors(tmp_path / "calib", "calibration", arrays, {**header, **change})
    with pytest.raises(ArtifactError, match="calib"):
        Calibration.load(tmp_path / "calib")


def test_noise_levels_are_walked_downwards_with_any_guidance(host):
    seen = []
    host.generate(["a"], [1], 3, callback=seen.append)
    assert all(before.sigma > after.sigma for before, after in pairwise(seen))


def test_rows_that_are_alone_come_in_an_order_that_keeps_both_sides_together():
    """In runs of 16 pictures, so that a batch of averaged min-max, and what is held out, has both sides of each."""
    host = Host(alone=True)
    calib = mq.calibrate(mq.Model(host), 18, steps=1)
    assert (calib.sides, calib.level_samples) == (1, 36)
    _, states = calib.batches(host)
    latents = [calib.latents[0, picture] for picture in range(18)]

    def picture_of(state):
        return next(i for i, latent in enumerate(latents) if mx.array_equal(host.pack(latent[None]), state["latent"]))

    order = [picture_of(state) for state in states]
    assert order == [*range(16), *range(16), 16, 17, 16, 17]
    empty = host.unconditional(1)
    unprompted = [bool(mx.array_equal(state["tokens"], empty["tokens"])) for state in states]
    assert unprompted == [False] * 16 + [True] * 16 + [False] * 2 + [True] * 2
    _, in_order = calib.in_order(host)
    assert [picture_of(state) for state in in_order] == [picture for picture in range(18) for _ in range(2)]


def test_the_explicit_pipeline_needs_rows_that_can_be_joined(tmp_path):
    host = Host(alone=True)
    with pytest.raises(AdapterError, match=r"cannot share a forward pass.*mlxquant quantize"):
        open_folder(host, host.prompts("calibration", 1), 2, 2.0, 0, tmp_path / "calib")
    assert not (tmp_path / "calib").exists()


def test_layers_are_reported_once_a_noise_level(host):
    model, calib = mq.Model(host), mq.calibrate(mq.Model(host), 2, steps=3)
    quantized = mq.quantize(model, calib, "rtn-w4a8")
    report = layer_report(model, quantized, calib, silent)
    assert report["sigma"] == sorted({float(np.float32(sigma)) for sigma in calib.sigmas})
    assert {len(errors) for errors in report["stages"]["error"]} == {3}
    for row in report["layers"]:
        assert len(row["error"]) == len(row["range"]["low"]) == 3
