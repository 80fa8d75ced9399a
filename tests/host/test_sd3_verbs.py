"""SD3-Medium from its first file to its last picture: recipes, the six steps, saved models, DiffusionKit's pipeline,
what can go wrong.
"""

import json
import shutil
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxquant as mq
from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import find_linears
from mlxquant.models.diffusionkit.text_encoders import TextEncoders

from support.command_line import fail, succeed

pytestmark = pytest.mark.diffusionkit
PROMPT = "a cat on a mat"
HUB = "argmaxinc/mlx-stable-diffusion-3-medium"


def drawing(model, folder):
    """The command that draws one small picture, ``a.png`` in a folder."""
    options = ("--size", 64, "--prompt", PROMPT, "--steps", 1, "--output", folder / "a.png")
    return ("generate", "--model", model, "--host", "diffusionkit", *options)


@pytest.fixture(scope="module")
def made(sd3_folder, tmp_path_factory):
    """A quantized model, saved, and the same in memory."""
    folder = tmp_path_factory.mktemp("made")
    model = mq.load(f"diffusionkit:{sd3_folder}", size=64)
    calib = mq.calibrate(model, prompts=2, steps=3, cfg=4.0)
    quantized = mq.quantize(model, calib, "gptq-w4a8")
    quantized.save(folder / "w4a8")
    return folder / "w4a8", quantized


def test_diffusionkits_pipeline_draws_with_a_loaded_model(made, tmp_path):
    """Calibrate, quantize, load, generate_image, PNG; per-timestep activation scales find their time in its sampler,
    too.
    """
    folder, quantized = made
    loaded = mq.load(folder)
    layers = loaded.layers
    assert len(layers) == len(find_linears(mq.load(f"diffusionkit:{loaded.adapter.place}").adapter.module))
    assert sum(layer.table is not None for layer in layers.values()) == 21
    image, _ = loaded.adapter.pipeline().generate_image(PROMPT, num_steps=3, cfg_weight=4.0, latent_size=(8, 8), seed=5)
    image.save(tmp_path / "cat.png")
    ours = quantized.generate(PROMPT, seed=5, steps=3, cfg=4.0)
    with Image.open(tmp_path / "cat.png") as saved:
        off = np.abs(np.array(saved, np.int32) - np.array(ours, np.int32))
        # prompts are encoded in other batches, whose last bits decide on which side a rounded input falls
        assert off.max() <= 3
        assert off.mean() < 1
        assert saved.size == (64, 64)
    again = np.array(loaded.generate(PROMPT, seed=5, steps=3, cfg=4.0), np.int32)
    assert np.abs(again - np.array(ours, np.int32)).max() <= 3  # as above


def test_a_hundred_alternating_prompts(made):
    """On one loaded model memory does not grow, and the first and the last picture of a seed are the same."""
    model = mq.load(made[0])
    pipe = model.adapter.pipeline()
    held, first, last = [], {}, {}
    for index in range(100):
        which = index % 2
        if index % 10 < 8:
            image = model.generate(f"{PROMPT} number {which}", seed=which, steps=1)
        else:
            image, _ = pipe.generate_image(
                f"{PROMPT} number {which}", num_steps=1, cfg_weight=5.0, latent_size=(8, 8), seed=which
            )
        kind = (which, index % 10 < 8)
        first.setdefault(kind, np.array(image))
        last[kind] = np.array(image)
        mx.clear_cache()
        held.append(mx.get_active_memory())
    assert held[-1] <= held[19]
    for kind, image in first.items():
        np.testing.assert_array_equal(image, last[kind])


@pytest.mark.parametrize("recipe", ["taqdit-w4a8", "adaround-w3a16", "rtn-w4a8-g128", "descent-w8a8-static"])
def test_recipes_run_and_survive_saving(sd3_folder, tmp_path, recipe):
    arguments = ["--steps", 2, "--num-prompts", 2, "--size", 64, "--iters", 3]
    facts, _ = succeed(
        "quantize",
        "--model",
        sd3_folder,
        "--host",
        "diffusionkit",
        "--recipe",
        recipe,
        "--out",
        tmp_path / "model",
        *arguments,
    )
    assert facts["bits_per_weight"] < 16
    assert "inf" not in json.dumps(facts)
    picture, _ = succeed(
        "generate", "--model", tmp_path / "model", "--prompt", PROMPT, "--steps", 2, "--output", tmp_path / "a.png"
    )
    with Image.open(picture["output"]) as image:
        assert image.size == (64, 64)


def test_the_six_steps(sd3_folder, tmp_path):
    calib, where = tmp_path / "calib", ["--model", sd3_folder, "--host", "diffusionkit"]
    succeed(
        "generate-calibration-data", *where, "--num-images", 2, "--num-steps", 3, "--calib-dir", calib, "--size", 64
    )
    succeed("cache-adaround-data", *where, "--calib-dir", calib, "--num-images", 2, "--stride", 2)
    succeed(
        "adaround-optimize",
        *where,
        "--cache-dir",
        calib / "adaround_cache",
        "--output-dir",
        tmp_path / "weights",
        "--iters",
        3,
        "--start",
        "qronos",
    )
    succeed("collect-layer-activations", *where, "--calib-dir", calib, "--num-images", 2, "--stride", 2)
    succeed("analyze-activations", *where, "--stats", calib / "activations" / "layer_statistics.json")
    tracks = ["--adaround-output", tmp_path / "weights", "--quant-config", calib / "activations" / "quant_config.json"]
    drawing = [
        "--prompt",
        PROMPT,
        "--num-steps",
        2,
        "--size",
        64,
        "--output-image",
        tmp_path / "a.png",
        "--compare",
        "--diff-stats",
    ]
    facts, _ = succeed("load-adaround-model", *where, *tracks, *drawing, "--save", tmp_path / "model")
    assert set(facts["models"]) == {"RTN", "V1", "V2"}
    assert all(np.isfinite(row["psnr_db"]) for row in facts["models"].values())
    loaded = mq.load(tmp_path / "model")
    blocks = [
        path
        for path in mq.load(f"diffusionkit:{sd3_folder}").adapter.layers()
        if loaded.adapter.role(path) in ("attention", "mlp")
    ]
    assert set(blocks) <= loaded.layers.keys()
    assert loaded.generate(PROMPT, steps=1).size[0] > 0


def test_the_hub_ids_are_the_folder(hub_cache, sd3_folder):
    by_name, by_id, by_folder = (
        mq.load(where).adapter
        for where in ("diffusionkit:sd3-medium", f"diffusionkit:{HUB}", f"diffusionkit:{sd3_folder}")
    )
    assert by_name.fingerprint == by_id.fingerprint == by_folder.fingerprint
    text = [adapter.encode([PROMPT]) for adapter in (by_name, by_folder)]
    np.testing.assert_array_equal(np.array(text[0]["tokens"]), np.array(text[1]["tokens"]))


def test_a_saved_model_finds_its_text_encoders(made, sd3_folder, tmp_path):
    """It names them by a path from its own place, so that both can move together; where they are not, the error says
    so.
    """
    stated = json.loads((made[0] / "model.json").read_text())["model"]["place"]
    assert stated.startswith(".")
    shutil.copytree(sd3_folder, tmp_path / "there" / "sd3")
    (tmp_path / "moved").mkdir()
    model = mq.load(f"diffusionkit:{sd3_folder}", size=64)
    mq.quantize(model, mq.calibrate(model, prompts=1, steps=1), "rtn-w4a16").save(tmp_path / "first")
    adapter = mq.load(f"diffusionkit:{tmp_path / 'there' / 'sd3'}", size=64)
    mq.quantize(adapter, mq.calibrate(adapter, prompts=1, steps=1), "rtn-w4a16").save(tmp_path / "there" / "model")
    expected = np.array(mq.load(tmp_path / "there" / "model").generate(PROMPT, steps=1))
    shutil.move(tmp_path / "there", tmp_path / "moved" / "here")
    np.testing.assert_array_equal(
        np.array(mq.load(tmp_path / "moved" / "here" / "model").generate(PROMPT, steps=1)), expected
    )
    shutil.rmtree(tmp_path / "moved" / "here" / "sd3")
    with pytest.raises(ArtifactError, match="text encoders and VAE are expected there"):
        mq.load(tmp_path / "moved" / "here" / "model").generate(PROMPT, steps=1)


def test_a_hub_model_needs_no_checkpoint_to_load(hub_cache, tmp_path, monkeypatch):
    """A quantized folder has the whole transformer: of the full-precision file only the VAE is read, and that when a
    picture is drawn.
    """
    model = mq.load("diffusionkit:sd3-medium", size=64)
    mq.quantize(model, mq.calibrate(model, prompts=1, steps=1), "rtn-w4a16").save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["model"]["place"] in ("", HUB)
    from mlxquant.models.diffusionkit import adapter as sd3_medium

    monkeypatch.setattr(
        sd3_medium, "mmdit_weights", lambda path: pytest.fail("the full-precision transformer was read")
    )
    assert mq.load(tmp_path / "model").generate(PROMPT, steps=1).size == (64, 64)


def test_a_missing_file_is_named_with_the_command_that_gets_it(sd3_folder, tmp_path):
    for name in ("clip_l/model.fp16.safetensors", "tokenizer_g/vocab.json", "t5/t5xxl.safetensors", "t5/config.json"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(sd3_folder, folder)
        (folder / name).unlink()
        said = fail(*drawing(folder, tmp_path))
        assert f"{folder / name} is missing" in said
        assert "hf download" in said
        assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip_g/config.json", "not the config of a CLIP text encoder"),
        ("tokenizer_l/vocab.json", "not a CLIP tokenizer"),
        ("clip_l/model.fp16.safetensors", "not a safetensors file"),
        ("t5/t5xxl.safetensors", "not a safetensors file"),
        ("tokenizer_g/vocab.json", "not a CLIP tokenizer"),
        ("t5/config.json", "T5's config or tokenizer cannot be read"),
    ],
)
def test_a_damaged_file_is_named(sd3_folder, tmp_path, name, message):
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    (tmp_path / "sd3" / name).write_text("{")
    said = fail(*drawing(tmp_path / "sd3", tmp_path))
    assert message in said
    assert "again" in said


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip_l/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole"),
        ("clip_l/config.json", {"architectures": []}, "architectures has 0 entries"),
        ("clip_g/config.json", {"hidden_act": "x" * 10**6}, "hidden_act is 'xxx"),
        ("tokenizer_l/vocab.json", {"<|endoftext|>": 10**9}, "is 1000000000, expected a whole number from 0 to"),
        ("t5/config.json", {"num_layers": 10**9}, "num_layers is 1000000000, expected a whole"),
        ("t5/config.json", {"vocab_size": 2}, "the number of its tokenizer's tokens is"),
        ("t5/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"}, "T5's"),
    ],
)
def test_what_configs_say_is_bounded_before_anything_is_built(sd3_folder, tmp_path, name, changes, message):
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    path = tmp_path / "sd3" / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    *_, said = fail(*drawing(tmp_path / "sd3", tmp_path)).splitlines()
    assert message in said
    assert len(said) < 510


def test_a_hub_that_refuses_says_what_to_do(monkeypatch):
    """Gated, offline without the file, unknown: each has its own remedy."""
    hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")

    class Response:
        headers = {}  # noqa: RUF012
        request = url = None

        def __init__(self, status):
            self.status_code = status

    def of(kind, status):
        error = kind.__new__(kind)
        Exception.__init__(error, f"status {status}\nand more")
        error.response = Response(status)
        return error

    forbidden = errors.LocalEntryNotFoundError("offline")
    forbidden.__cause__ = of(errors.HfHubHTTPError, 403)
    cases = [
        ("accept the licence at https://huggingface.co/argmaxinc", of(errors.GatedRepoError, 401)),
        ("accept the licence at", of(errors.RepositoryNotFoundError, 404)),
        ("accept the licence at", of(errors.HfHubHTTPError, 401)),
        ("fine-grained token", forbidden),
        ("without HF_HUB_OFFLINE", errors.LocalEntryNotFoundError("offline")),
        ("has no file sd3_medium.safetensors", errors.EntryNotFoundError("no")),
        ("could not be downloaded (status 500); run the same command again", of(errors.HfHubHTTPError, 500)),
        ("could not be downloaded (timed out)", TimeoutError("timed out")),
        ("could not be downloaded (xet)", RuntimeError("xet")),
    ]
    for message, error in cases:

        def refuse(*arguments, error=error):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", refuse)
        assert message in fail("generate", "--model", "sd3-medium", "--host", "diffusionkit", "--prompt", PROMPT)


def test_incomplete_encoders_are_refused(sd3_folder, tmp_path):
    """T5 without a tensor, or with one of another shape, would encode noise."""
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    path = tmp_path / "sd3" / "t5" / "t5xxl.safetensors"
    arrays = mx.load(str(path))
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    more = {**arrays, **{key.replace("block.0", "block.1"): value for key, value in arrays.items() if "block.0" in key}}
    for message, tensors in {
        "tensors are missing": {key: value for key, value in arrays.items() if key != name},
        "has shape": {**arrays, name: arrays[name][:5]},
        "more layers than": {
            key: value for key, value in more.items() if "block.1.layer.0.SelfAttention.relative" not in key
        },
    }.items():
        path.unlink()
        mx.save_safetensors(str(path), tensors)
        assert message in fail(
            "generate",
            "--model",
            tmp_path / "sd3",
            "--host",
            "diffusionkit",
            "--size",
            64,
            "--prompt",
            PROMPT,
            "--output",
            tmp_path / "a.png",
        )


def test_a_missing_vae_is_missed_before_sampling(made, tmp_path):
    """Whoever has only the quantized folder learns at once that the VAE comes from the full-precision files."""
    model = mq.load(made[0])
    model.adapter.place = str(tmp_path)
    steps = []
    for draw in (
        lambda: model.images([mq.Prompt(1, PROMPT)], 2, callback=steps.append),
        lambda: model.adapter.pipeline().generate_image(PROMPT, num_steps=2),
    ):
        with pytest.raises(ArtifactError, match="is missing; get it with 'hf download"):
            draw()
    assert steps == []


def test_text_is_encoded_once_a_step(sd3_folder, tmp_path, monkeypatch):
    """Loading T5 costs more than a batch of pictures does."""
    calls = []
    original = TextEncoders.encode
    monkeypatch.setattr(
        TextEncoders, "encode", lambda self, prompts: calls.append(len(prompts)) or original(self, prompts)
    )
    calib, where = tmp_path / "calib", ["--model", sd3_folder, "--host", "diffusionkit"]
    succeed(
        "generate-calibration-data", *where, "--num-images", 4, "--num-steps", 2, "--calib-dir", calib, "--size", 64
    )
    assert calls == [5]
    succeed("collect-layer-activations", *where, "--calib-dir", calib, "--num-images", 4, "--stride", 1)
    assert calls[1:] == [5]
    succeed("cache-adaround-data", *where, "--calib-dir", calib, "--num-images", 4, "--stride", 1)
    assert sum(calls[2:]) <= 6  # and perhaps one of them before, to see what a block writes


def test_quantized_models_are_not_calibrated(made, tmp_path):
    said = fail("generate-calibration-data", "--model", made[0], "--num-images", 1, "--calib-dir", tmp_path / "calib")
    assert "is quantized; draw the trajectories with the full-precision model" in said
    assert "holds a quantized model; this needs the full-precision one" in fail(
        "cache-adaround-data", "--model", made[0], "--calib-dir", tmp_path
    )
    assert not (tmp_path / "calib").exists()


def test_pictures_of_two_sizes_are_not_compared(made, sd3_folder, tmp_path):
    with pytest.raises(AdapterError, match="load both with the same size"):
        mq.compare(mq.load(f"diffusionkit:{sd3_folder}", size=128), mq.load(made[0]), PROMPT)
    arguments = [
        "--compare",
        f"diffusionkit:{sd3_folder}",
        "--prompt",
        PROMPT,
        "--steps",
        1,
        "--output",
        tmp_path / "a.png",
    ]
    facts, _ = succeed("generate", "--model", made[0], *arguments)  # the reference draws in the quantized model's size
    assert np.isfinite(facts["psnr_db"])


def test_more_prompts_than_there_are_is_an_error(sd3_folder):
    with pytest.raises(AdapterError, match=r"has 144 prompts of its own for calibration, 500 were asked for"):
        mq.load(f"diffusionkit:{sd3_folder}", size=64).adapter.prompts("calibration", 500)


def test_a_folder_may_be_left(sd3_folder, monkeypatch, tmp_path):
    """A path that was given from where one stood then still holds where one stands now."""
    monkeypatch.chdir(sd3_folder.parent)
    model = mq.load(f"diffusionkit:{sd3_folder.name}", size=64)
    monkeypatch.chdir(tmp_path)
    assert model.generate(PROMPT, steps=1).size == (64, 64)


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "sd3_medium.safetensors" in fail("generate", "--model", tmp_path, "--prompt", PROMPT)
    assert "neither a folder, nor a hub id" in fail("generate", "--model", "sd4-medium", "--prompt", PROMPT)
