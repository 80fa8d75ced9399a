"""``--negative-prompt`` and ``--size 768x512`` through every command that draws, on hosts that are not like SD3."""

import json

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.calibration.trajectories import Calibration
from mlxquant.errors import AdapterError
from mlxquant.evaluation import cost
from mlxquant.files.checked import read_json
from mlxquant.models import catalog
from mlxquant.pipeline.samples import Samples

from support.command_line import fail, succeed
from support.other_host import Host

MODEL = ("--model", "other-host")
FOG = ("--negative-prompt", "fog by night")


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """``other-host`` is a model like others; its options can be set."""
    entry = catalog.KnownModel("support.other_host", "Host")
    monkeypatch.setitem(catalog.MODELS, "other-host", entry)
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(cost, "STEPS", 2)
    options = {}
    monkeypatch.setattr(Host, "pretrained", classmethod(lambda cls, place="": cls(**options)))
    return options


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_generate_leads_away_from_a_negative_prompt(tmp_path):
    draw = ("generate", *MODEL, "--prompt", "a tree", "--seed", 3)
    for name, more in (("plain", ()), ("fog", FOG), ("blank", ("--negative-prompt", " "))):
        succeed(*draw, *more, "--output", tmp_path / f"{name}.png")
    plain, fog, blank = (pixels(tmp_path / f"{name}.png") for name in ("plain", "fog", "blank"))
    assert plain.shape == (32, 48, 3)
    assert (plain == blank).all()
    assert (plain != fog).any()


@pytest.mark.parametrize(("guidance", "found"), [("embedded", "guidance embedded"), ("none", "guidance none")])
def test_who_has_no_other_side_refuses_one(host, guidance, found, tmp_path):
    host["guidance"] = guidance
    for command in (
        ("generate", *MODEL, "--prompt", "a tree", "--output", tmp_path / "a.png"),
        ("quantize", *MODEL, "--recipe", "rtn-w4a8", "--out", tmp_path / "q"),
        ("evaluate", *MODEL, "--recipe", "rtn-w4a8", "--out", tmp_path / "r"),
        ("generate-calibration-data", *MODEL, "--num-images", 1, "--calib-dir", tmp_path / "c"),
    ):
        said = fail(*command, *FOG)
        assert found in said
        assert "leave it out" in said
        assert len([line for line in said.splitlines() if line.startswith("Error")]) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_weight_1_is_no_guidance(tmp_path):
    draw = ("generate", *MODEL, "--prompt", "a tree", "--output", tmp_path / "a.png")
    assert "a cfg weight of 1" in fail(*draw, *FOG, "--cfg-weight", 1)


def test_a_model_without_guidance_is_drawn_without_a_weight(host, tmp_path):
    host["guidance"] = "none"
    draw = ("generate-calibration-data", *MODEL, "--num-images", 1, "--num-steps", 2)
    succeed(*draw, "--calib-dir", tmp_path / "c")
    assert Samples.read(tmp_path / "c").guidance.facts == {"cfg": 1.0, "guidance": "none"}
    assert "no guidance, found a cfg weight of 7.5" in fail(*draw, "--cfg-weight", 7.5, "--calib-dir", tmp_path / "d")


@pytest.mark.parametrize("options", [{}, {"guidance": "embedded", "packed": True}, {"alone": True, "packed": True}])
def test_quantize_draw_and_compare_pictures_that_are_no_squares(host, options, tmp_path):
    host.update(options)
    fog = FOG if options.get("guidance") != "embedded" else ()
    size = ("--size", "80x32")
    quantize = ("quantize", *MODEL, *size, "--recipe", "gptq-w4a8", "--steps", 2, "--num-prompts", 2)
    succeed(*quantize, *fog, "--out", tmp_path / "q")
    facts = read_json(tmp_path / "q" / "model.json", "quantized-model")
    assert facts["calibration"]["latent_shape"] == [4, 10, 4]
    assert facts["calibration"].get("negative") == (fog[1] if fog else None)
    draw = ("generate", "--model", tmp_path / "q", "--prompt", "a tree", "--steps", 2, *fog)
    succeed(*draw, *size, "--output", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").shape == (32, 80, 3)
    facts, _ = succeed(*draw, *size, "--compare", "other-host", "--output", tmp_path / "b.png")
    assert 8 < facts["psnr_db"] < 60
    assert "found 40x64" not in fail(*draw, "--size", "40x64", "--output", tmp_path / "c.png")


def test_the_report_is_of_the_size_and_the_negative_prompt(tmp_path):
    evaluate = ("evaluate", *MODEL, "--recipe", "rtn-w4a8", "--steps", 2, "--num-prompts", 3, "--size", "80x32")
    succeed(*evaluate, *FOG, "--num-calibration-prompts", 1, "--out", tmp_path / "r")
    settings = read_json(tmp_path / "r" / "report.json", "evaluation")["settings"]
    assert (settings["size"], settings["negative_prompt"]) == ([80, 32], FOG[1])
    assert settings["calibration"]["negative_prompt"] == FOG[1]
    pictures = sorted((tmp_path / "r" / "images").rglob("*.png"))
    assert len(pictures) == 9
    assert {pixels(path).shape for path in pictures} == {(32, 80, 3)}
    page = (tmp_path / "r" / "report.html").read_text()
    assert "of 80x32 pixels, 2 steps, guidance 2 away from" in page
    assert FOG[1] in page
    saved = read_json(tmp_path / "r" / "models" / "rtn-w4a8" / "model.json", "quantized-model")
    assert saved["calibration"]["negative"] == FOG[1]


def test_the_explicit_pipeline_goes_on_with_the_negative_prompt(tmp_path):
    draw = ("generate-calibration-data", *MODEL, "--num-images", 2, "--num-steps", 2, "--size", "32x48")
    calib = tmp_path / "c"
    succeed(*draw, *FOG, "--cfg-weight", 2, "--calib-dir", calib)
    manifest = json.loads((calib / "manifest.json").read_text())
    assert (manifest["negative"], manifest["latent_shape"]) == (FOG[1], [6, 4, 4])
    samples = Samples.read(calib)
    calibration = samples.calibration(2, 1)
    assert calibration.guidance == samples.guidance
    adapter = Host()
    adapter.resize((32, 48))
    _, states = calibration.batches(adapter)
    words = adapter.encode([FOG[1]])["tokens"][0]
    np.testing.assert_array_equal(np.array(states[0]["tokens"][-1]), np.array(words))
    assert "other" in fail(*draw, "--cfg-weight", 2, "--calib-dir", calib)
    succeed("cache-adaround-data", "--calib-dir", calib, "--num-images", 2, "--stride", 1)
    assert json.loads((calib / "adaround_cache" / "metadata.json").read_text())["negative"] == FOG[1]
    succeed("collect-layer-activations", "--calib-dir", calib, "--num-images", 2, "--stride", 1)


@pytest.mark.parametrize("size", ["64x", "x", "0", "64x0", "1x2x3", "big", "99999"])
def test_what_is_no_size_is_one_clear_error(size, tmp_path):
    draw = ("generate", *MODEL, "--prompt", "a tree", "--output", tmp_path / "a.png")
    said = fail(*draw, "--size", size, code=2)
    assert f"{size!r} is no size of a picture; expected WIDTHxHEIGHT such as 768x512" in said


def test_a_model_of_one_size_says_which(tmp_path):
    draw = ("generate", "--model", "mmdit-shapes", "--prompt", "a large red circle at left on white background")
    said = fail(*draw, "--size", "64x32", "--output", tmp_path / "a.png", code=1)
    assert "mmdit-shapes draws pictures of one size only, 32 pixels, found 64x32; leave --size out" in said
    succeed(*draw, "--size", 32, "--steps", 1, "--output", tmp_path / "a.png")


def test_calibrations_of_earlier_releases_have_the_empty_prompt(tmp_path):
    """Their files say nothing about a negative prompt, nor about kinds of guidance."""
    host = Host()
    made = (host.name, "", tuple(host.prompts("calibration", 1)), 1, host.guiding(), np.ones(1))
    calib = Calibration(*made, mx.zeros((1, 1, *host.latent_shape)))
    assert calib.facts.keys() == {"model", "source", "prompts", "steps", "cfg", "latent_shape", "samples", "pictures"}
    calib.save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").guidance.facts == {"cfg": 2.0}


def test_python_takes_width_and_height_or_a_side():
    assert mq.load("other-host", size=(80, 32)).diffusion.latent_shape == (4, 10, 4)
    assert mq.load("other-host", 64).diffusion.size == (64, 64)
    assert mq.load("other-host").diffusion.size == (48, 32)
    with pytest.raises(AdapterError, match="is no size of a picture"):
        mq.load("other-host", (80, 0))
    with pytest.raises(AdapterError, match="draws no pictures"):
        mq.load("gpt-python", (80, 32))
