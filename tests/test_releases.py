"""What every release has written loads for ever: models, and what they say and draw; files that later steps read;
reports.

``tests/releases/write.py`` wrote the folders with the code of their releases; it says what they hold, and is used here
for inputs.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mlxquant as mq

# isort: split
import mlx.core as mx

from mlxquant.spin_quant.files import load_spun
from releases.write import PROMPT, STEPS, TEXT, Parts, command, continued, inputs, normal, picture, tiny_assets

RELEASES = sorted(path.parent for path in (Path(__file__).parent / "releases").glob("*/expected.json"))
CLOSE = 5e-5  # the kernels of another processor add up in another order


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def release(request, tmp_path):
    """A copy of what a release has written, with its tiny models in the place of those that ship."""
    folder = tmp_path / "release"
    shutil.copytree(request.param, folder)
    with tiny_assets(folder / "embedded"):
        yield folder


@pytest.fixture
def drawn(release):
    with np.load(release / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def said(release):
    return json.loads((release / "expected.json").read_text())


def test_there_are_releases():
    assert RELEASES


def test_picture_models_draw_what_they_drew(release, drawn):
    places = [place for place in drawn if (release / place).is_dir()]
    assert len(places) >= 6
    for place in places:
        assert picture(mq.load(release / place)) == pytest.approx(drawn[place], abs=CLOSE), place


def test_text_models_predict_what_they_predicted(release, said):
    places = [place for place in said if place.startswith("text/")]
    assert len(places) >= 4
    for place in places:
        assert mq.load(release / place).predict(TEXT[:400], length=16).bits_per_character == pytest.approx(
            said[place], abs=CLOSE
        )


def test_a_spun_model_goes_on_as_it_did(release, said):
    assert continued(release / "spun") == said["spun"]


def test_any_folder_with_a_model_is_loaded(release):
    """By whoever it was written: each tells what it is."""
    tokens = mx.array([[100, 101, 102, 32]])
    spun = mq.load(release / "spun")
    model, tokenizer, _ = load_spun(release / "spun")
    assert mx.array_equal(spun.adapter.module(tokens), model(tokens)).item()
    again = mq.load(release / "spun/spinquant.safetensors")
    figures = [one.predict(TEXT[:400], length=16).bits_per_character for one in (spun, again)]
    assert figures[0] == figures[1]
    assert list(spun.language.tokenizer.encode("def")) == list(tokenizer.encode("def"))
    with pytest.raises(mq.MlxQuantError, match="rotated by SpinQuant already"):
        spun.clone()
    assert mq.load(release / "text/trained").name == "gpt"
    assert isinstance(mq.load(release / "exports/mlx"), mq.QuantizedModel)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("module.safetensors", "load_module"),
        ("fake.safetensors", "FakeQuantLinear.load"),
        ("steps/adaround", "load-adaround-model"),
        ("steps/calib", "is no model but trajectories"),
        ("steps/calib/adaround_cache", "adaround-optimize"),
        ("steps/calib/activations", "analyze-activations"),
        ("steps/calib/activations/quant_config.json", "a file of kind 'quant-config'"),
        ("report", "a report on models"),
    ],
)
def test_what_is_no_model_is_one_clear_error(release, place, says):
    with pytest.raises(mq.MlxQuantError, match=says):
        mq.load(release / place)


def test_a_trained_folder_has_the_same_integers(release, tmp_path):
    command("save-weights", "--out-dir", release / "text/trained", "--file-name", tmp_path / "again.npz")
    with np.load(release / "integers.npz") as kept, np.load(tmp_path / "again.npz") as found:
        assert sorted(kept) == sorted(found)
        for name in kept:
            assert np.array_equal(kept[name], found[name]), name


def test_single_modules_compute_what_they_computed(release, drawn):
    for at, array in enumerate(mq.load_module(Parts(), release / "module.safetensors")(*inputs())):
        assert np.array(array) == pytest.approx(drawn[f"module.{at}"], abs=CLOSE)
    fake = mq.FakeQuantLinear.load(release / "fake.safetensors")
    assert np.array(fake(mx.array(normal((4, 32), 7)), timestamp=1.5)) == pytest.approx(drawn["fake"], abs=CLOSE)


def test_every_step_accepts_what_the_steps_before_wrote(release, tmp_path, drawn):
    calib, rounded = release / "steps/calib", release / "steps/adaround"
    kept = json.loads((calib / "activations/quant_config.json").read_text())
    stats = calib / "activations/layer_statistics.json"
    command(
        "cache-adaround-data",
        "--calib-dir",
        calib,
        "--output-dir",
        tmp_path / "cache",
        "--num-images",
        1,
        "--stride",
        1,
    )
    cache = calib / "adaround_cache"
    command(
        "adaround-optimize",
        "--cache-dir",
        cache,
        "--output-dir",
        tmp_path / "rounded",
        "--iters",
        1,
        "--calib-dir",
        calib,
    )
    command(
        "collect-layer-activations",
        "--calib-dir",
        calib,
        "--output-dir",
        tmp_path / "stats",
        "--num-images",
        1,
        "--rows",
        4,
    )
    command("analyze-activations", "--stats", stats, "--output", tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() == kept.keys()
    assert config["made_from"]["range_batch"] == json.loads(stats.read_text()).get("range_batch", 1)
    tracks = ("--adaround-output", rounded, "--quant-config", calib / "activations/quant_config.json")
    drawing = ("--prompt", PROMPT.text, "--num-steps", STEPS, "--output-image", tmp_path / "drawn.png")
    command("load-adaround-model", *tracks, *drawing, "--save", tmp_path / "model")
    assert picture(mq.load(tmp_path / "model")) == pytest.approx(drawn["steps/model"], abs=CLOSE)


def test_inspect_verifies_everything(release):
    places = [*(release / "pictures").iterdir(), *(release / "text").iterdir(), *(release / "exports").iterdir()]
    places += [
        release / name for name in ("spun", "module.safetensors", "fake.safetensors", "steps/calib", "steps/adaround")
    ]
    places += [release / name for name in ("steps/model", "report", "report/report.json", "steps/calib/adaround_cache")]
    for place in places:
        assert command("inspect", place), place


def test_a_damaged_file_is_refused(release):
    path = release / "pictures/static/weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(mq.MlxQuantError, match="checksum"):
        mq.load(path.parent)
