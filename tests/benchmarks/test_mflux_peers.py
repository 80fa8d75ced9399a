"""benchmarks/mflux_peers.py: contenders have the bytes they say and the weights mflux runs, errors are of what is
compared, and the model that was trained in batches is the one that mflux calls.
"""

import json
from importlib import import_module
from pathlib import Path

import mlxquant  # noqa: F401  before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_map_with_path

pytestmark = pytest.mark.mflux
EVEN = "gptq-w4a16-g64,@modulation=w4a16-g64,@embedder=w4a16-g64,@output=w4a16-g64"


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks by its name; mflux's precision is put back behind it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    config = import_module("mflux.models.common.config.model_config").ModelConfig
    monkeypatch.setattr(config, "precision", config.precision)
    return import_module


@pytest.fixture
def small(benchmark):
    """The Z-Image of the benchmark with random weights, none of them zero."""
    model = benchmark("train_z_image_shapes").fresh_model(0)
    model.update(
        tree_map_with_path(lambda path, value: value + 0.05 * mx.random.normal(value.shape), model.parameters())
    )
    return model


@pytest.mark.parametrize("caption", ["a large red circle at left on white background", ""])
def test_a_batch_is_what_mflux_says_of_each(benchmark, small, caption):
    shapes = benchmark("z_image_shapes")
    latents = mx.random.normal((2, 16, 16, 16), key=mx.random.key(1))
    ids = mx.array([shapes.tokenize(text) for text in (caption, "a red cross above a blue square on pink background")])
    found = small.velocities(latents, ids, mx.array([0.3, 0.9]))[0]
    one = small.transformer(
        x=latents[0].transpose(2, 0, 1)[:, None],
        timestep=mx.array([0.7]),
        sigmas=mx.array([1.0, 0.0]),
        cap_feats=small.read(caption),
    )
    np.testing.assert_allclose(found, one[:, 0].transpose(1, 2, 0), atol=2e-5)


def test_pictures_come_back_from_latents(benchmark):
    shapes, images = benchmark("z_image_shapes"), np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    latents = shapes.encode(mx.array(images))
    assert latents.shape == (2, 16, 16, 16)
    np.testing.assert_allclose(shapes.pixels(latents), images, atol=1e-6)
    assert shapes.pixels(2 * latents).min() < 0, "what sticks out is not cut"


def test_trained_weights_are_found_again(benchmark, small, tmp_path):
    training, shapes = benchmark("train_z_image_shapes"), benchmark("z_image_shapes")
    training.publish(tmp_path / "weights.safetensors", small.parameters(), {"step": 3})
    again = shapes.load(tmp_path / "weights.safetensors")
    np.testing.assert_allclose(again.words.weight, small.words.weight, atol=1e-3)


def test_flat_places_are_background_whatever_a_drawing_jitters(benchmark):
    subjects, scenes = benchmark("mflux_subjects"), import_module("mlxquant.models.shapes.scenes")
    for caption in scenes.captions(held_out=True, count=20):
        place = subjects.flat(caption)
        drawn = scenes.draw(scenes.parse(caption), np.random.default_rng(0))
        assert place.sum() > 100
        assert subjects.deviation(drawn[None], [place]) == pytest.approx([0.0], abs=1e-3)


def test_deviation_is_of_flat_places_alone_in_255ths(benchmark):
    picture, place = np.zeros((4, 4, 3)), np.zeros((4, 4), bool)
    place[0, :2] = True
    picture[0, 0], picture[3, 3] = 2 / 255, 1.0
    assert benchmark("mflux_subjects").deviation(picture[None], [place]) == pytest.approx([1.0])


def test_error_is_the_root_of_the_squared_difference_over_the_square(benchmark):
    peers = benchmark("mflux_peers")
    assert peers.error([mx.array([3.0]), mx.array([5.0])], [mx.array([3.0]), mx.array([4.0])]) == pytest.approx(0.2)
    assert peers.root_mean([3.0, 4.0]) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_what_minus_q_makes_is_mlx_s_rounding_in_bfloat16(benchmark, small, tmp_path, bits):
    contenders, subjects = benchmark("mflux_contenders"), benchmark("mflux_subjects")
    contenders.write(small.transformer, tmp_path)
    loaded = contenders.load(tmp_path, benchmark("z_image_shapes").transformer(), subjects.ZImageWeightDefinition, bits)
    weight = small.transformer.layers[0].attention.to_q.weight.astype(mx.bfloat16)
    rounded = mx.dequantize(*mx.quantize(weight, 64, bits), 64, bits)
    found = loaded.module.layers[0].attention.to_q.weight
    np.testing.assert_allclose(found, rounded.astype(mx.float32), rtol=0.01, atol=1e-3)
    linears = {path: one for path, one in loaded.module.named_modules() if isinstance(one, nn.Linear)}
    assert loaded.layers == dict.fromkeys(linears, bits)
    packed = sum(one.weight.size * (bits + 0.5) / 8 for one in linears.values())
    assert loaded.nbytes == pytest.approx(packed, rel=0.02)


@pytest.mark.slow
def test_a_run_keeps_rows_of_equal_bytes_and_measures_none_of_them_again(benchmark, tmp_path):
    peers = benchmark("mflux_peers")
    arguments = [
        "--model=random",
        "--num-prompts=1",
        "--calibration-prompts=1",
        "--steps=2",
        "--work",
        tmp_path / "work",
    ]
    names = [f"--row={name}" for name in (peers.EXACT, "mflux -q 4", EVEN)]
    first = CliRunner().invoke(peers.main, [*map(str, arguments), *names])
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout.splitlines()[-1])["rows"]
    assert rows[peers.EXACT]["velocity_each"] == [0.0]
    assert 0 < rows[EVEN]["guided_each"][0] < rows["mflux -q 4"]["guided_each"][0]
    assert rows["mflux -q 4"]["bytes"] == rows[EVEN]["bytes"]
    assert 0 < rows[EVEN]["velocity_each"][0] < rows["mflux -q 4"]["velocity_each"][0]
    again = CliRunner().invoke(peers.main, [*map(str, arguments), *names])
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == rows


def test_a_model_that_draws_needs_its_weights(benchmark, tmp_path):
    done = CliRunner().invoke(benchmark("mflux_peers").main, ["--work", str(tmp_path / "work")])
    assert done.exit_code == 1
    assert "train_z_image_shapes.py" in done.output
