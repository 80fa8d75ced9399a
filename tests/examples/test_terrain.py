"""The UNet of Adaptive Terrain Diffusion in MLX: its structure on random weights, and, where its weights are installed,
that it draws what the package's own graph and generator draw.
"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import mlxquant as mq

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.layers.kinds import kind_of

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMETERS = 10_456_545


@pytest.fixture
def terrain(monkeypatch):
    """Imports a module of the example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: import_module(f"terrain.{name}")


@pytest.fixture
def small(terrain):
    """A network of random weights with all that the large one has."""
    mx.random.seed(0)
    return terrain("network").UNet(widths=(32, 64), depth=1, attending=(1,), embedding=16)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_it_is_the_network_that_was_trained(terrain):
    network = terrain("network")
    model = network.UNet()
    assert sum(value.size for _, value in tree_flatten(model.parameters())) == PARAMETERS
    assert len(convolutions(model)) == 196
    assert sum(isinstance(module, network.AttentionBlock) for module in model.modules()) == 28
    assert len(model.input_blocks) == len(model.output_blocks) == 25


def test_nearly_all_of_its_parameters_are_in_layers_that_can_be_quantized(terrain):
    model = terrain("network").UNet()
    weights = sum(module.weight.size for module in model.modules() if kind_of(module) is not None)
    assert weights / PARAMETERS > 0.99


@pytest.mark.parametrize("side", [8, 16])
def test_it_draws_a_map_of_the_size_of_the_noise(small, side):
    drawn = small(mx.random.normal((2, side, side, 1)), mx.array([1.0, 2.0]), mx.array([0.0, 1.0]))
    assert drawn.shape == (2, side, side, 1)
    assert mx.isfinite(drawn).all()


def test_halves_and_doubles(terrain):
    network = terrain("network")
    x = mx.arange(16, dtype=mx.float32).reshape(1, 4, 4, 1)
    half = network.AverageDown()(x)
    assert half[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    np.testing.assert_array_equal(
        network.NearestUp()(half)[0, :, :, 0], np.repeat(np.repeat(half[0, :, :, 0], 2, 0), 2, 1)
    )


def test_what_was_on_the_way_down_reaches_the_way_up(small):
    """With the deepest block silenced, the map still depends on the noise."""
    inputs = mx.random.normal((1, 8, 8, 1)), mx.array([1.0]), mx.array([0.5])
    before = small(*inputs)
    small.middle_block.layers = [nn.Identity()]
    small.middle_block.__class__ = Silent
    first, second = small(*inputs), small(-inputs[0], *inputs[1:])
    assert mx.abs(first - before).max() > 1e-4
    assert mx.abs(first - second).max() > 1e-4


class Silent(nn.Module):
    def __call__(self, x, embedding):
        return mx.zeros_like(x)


@pytest.mark.parametrize("number", [1, 2])
def test_noise_level_and_difficulty_are_heard(small, number):
    inputs = [mx.random.normal((1, 8, 8, 1)), mx.array([1.0]), mx.array([0.5])]
    before = small(*inputs)
    inputs[number] = inputs[number] + 1
    assert mx.abs(small(*inputs) - before).max() > 1e-4


def test_it_is_recorded_as_a_chain_of_its_blocks(small):
    with mq.recording(small) as seen:
        small(mx.random.normal((1, 8, 8, 1)), mx.array([1.0]), mx.array([0.5]))
    report = mq.quantize_module(small, seen, "rtn-w4a16")
    middle = small.middle_block.layers
    assert len(report.blocks) == len(small.input_blocks) + len(middle) + len(small.output_blocks)
    assert not report.whole


def test_at_the_least_noise_the_denoiser_changes_nothing(terrain, small):
    network = terrain("network")
    clean = mx.random.uniform(-1, 1, (1, 8, 8, 1))
    same = network.Denoiser(small)(clean, mx.array([network.SIGMA_MIN]), mx.array([0.5]))
    np.testing.assert_allclose(same, clean, atol=1e-6)


def test_metres(terrain):
    heights = terrain("heights")
    drawn = np.stack([np.linspace(-1, 1, 4, dtype=np.float32).reshape(2, 2), np.zeros((2, 2), np.float32)])
    np.testing.assert_allclose(heights.metres(drawn)[0, 1, 1], heights.TALLEST, rtol=1e-5)
    assert heights.metres(drawn)[1].tolist() == [[0, 0], [0, 0]]


def test_without_the_package_it_says_what_to_install(terrain, monkeypatch):
    weights = terrain("weights")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install adaptive-terrain-diffusion==0\.4\.2 onnx"):
        weights.installed_file()


@pytest.fixture(scope="module")
def pretrained():
    """The trained model, read once."""
    sys.path.insert(0, str(EXAMPLES))
    yield import_module("terrain.weights").pretrained()
    sys.path.remove(str(EXAMPLES))


@pytest.mark.onnx
@pytest.mark.parametrize(("seed", "sigma"), [(0, 80.0), (1, 80.0), (2, 2.0)])
def test_it_computes_what_onnxruntime_computes(terrain, pretrained, seed, sigma):
    import onnxruntime

    session = onnxruntime.InferenceSession(terrain("weights").installed_file(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    noisy = random.standard_normal((1, 1, 128, 128), dtype=np.float32) * np.float32(sigma)
    level, difficulty = np.full(1, sigma, np.float32), random.random(1, np.float32)
    (wanted,) = session.run(["denoised"], {"noisy": noisy, "sigma": level, "difficulty": difficulty})
    got = pretrained(mx.array(noisy.transpose(0, 2, 3, 1)), mx.array(level), mx.array(difficulty))
    np.testing.assert_allclose(np.array(got).transpose(0, 3, 1, 2), wanted, rtol=0, atol=1e-4)


@pytest.mark.onnx
def test_it_draws_the_heights_of_the_packages_own_generator(terrain, pretrained):
    from terrain_diffusion import TerrainGenerator

    heights = terrain("heights")
    wanted = TerrainGenerator(device="cpu").generate(1, difficulty=60, seed=7)[0]
    got = heights.metres(heights.drawn(pretrained, 7, 60))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.ptp(wanted))


@pytest.mark.onnx
def test_quantized_weights_go_back_into_the_packages_file(terrain, tmp_path):
    from terrain_diffusion import TerrainGenerator

    heights, weights = terrain("heights"), terrain("weights")
    model = weights.pretrained()
    mq.quantize_linears(model, "w4a16")
    weights.write(model, tmp_path / "w4.onnx")
    wanted = TerrainGenerator(tmp_path / "w4.onnx", device="cpu").generate(1, difficulty=60, seed=7)[0]
    got = heights.metres(heights.drawn(model, 7, 60))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.ptp(wanted))


@pytest.mark.onnx
def test_weights_are_found_without_importing_the_package(terrain):
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); from terrain.weights import installed_file;"
        "assert installed_file().exists(); assert not {'terrain_diffusion', 'onnxruntime', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
