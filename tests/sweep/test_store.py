"""A stage that was finished comes back from disk as it was: same layers, same dtypes, same bytes when it is written
again.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.attention import QuantizedAttention
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.models.stages import Stage
from mlxquant.sweep.store import FolderStore, StageResult, layer_arrays

STAGE = Stage("block", ("block",), lambda state: state)
CLOCK = Clock()


def layers(dtype):
    rng = np.random.default_rng(0)
    table = ActivationTable(
        np.float32([0.2, 0.8]), np.float32([0.1, 0.2]), np.zeros((2, 64), np.float32), np.uint8([8, 8])
    )
    made = {}
    for path, format in (("block.a", "w4"), ("block.ab", "w8-asym")):
        weight = rng.normal(size=(8, 64)).astype(np.float32)
        grid = fit_extremes(weight, WeightFormat.parse(format))
        made[path] = QuantizedLinear(
            grid.quantize(weight), grid, mx.array(rng.normal(size=8)).astype(dtype), mx.ones(64)
        )
    made["block.a"].set_activations(table, CLOCK)
    return made


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_finished_stage_comes_back_as_it_was(tmp_path, dtype):
    made = layers(dtype)
    store = FolderStore(tmp_path, "job")
    store.save(STAGE, StageResult(made, {"error": 0.5}))
    first = (tmp_path / "block.safetensors").read_bytes()
    again = store.load(STAGE, CLOCK)
    assert again.facts == {"error": 0.5}
    x = mx.array(np.random.default_rng(1).normal(size=(1, 3, 64)).astype(np.float32))
    for path, layer in made.items():
        with CLOCK.at(0.5):
            np.testing.assert_array_equal(np.array(again.layers[path](x)), np.array(layer(x)))
    found, expected = layer_arrays(again.layers), layer_arrays(made)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert found["block.a.bias"].dtype == dtype
    store.save(STAGE, again)
    assert (tmp_path / "block.safetensors").read_bytes() == first


def test_quantized_attentions_come_back_with_their_stage(tmp_path):
    q, k, v = mx.random.normal((3, 1, 2, 5, 4), key=mx.random.key(2))
    table = ActivationTable(np.float32([0.5]), np.float32([1 / 15]), np.full((1, 1), 8 / 15, np.float32), np.uint8([4]))
    made = {"block.sdpa": QuantizedAttention(table, CLOCK)}
    store = FolderStore(tmp_path, "job")
    store.save(STAGE, StageResult({}, {}, attentions=made))
    again = store.load(STAGE, CLOCK).attentions
    assert again.keys() == made.keys()
    with CLOCK.at(0.5):
        np.testing.assert_array_equal(np.array(again["block.sdpa"](q, k, v)), np.array(made["block.sdpa"](q, k, v)))


def test_a_finished_stage_leaves_no_checkpoint(tmp_path):
    store = FolderStore(tmp_path, "job")
    store.checkpoint(STAGE).save({"alpha": mx.zeros(3)}, {"iteration": 25})
    store.save(STAGE, StageResult(layers(mx.float16), {}))
    assert [path.name for path in tmp_path.iterdir()] == ["block.safetensors"]
    assert store.checkpoint(STAGE).load() is None


def test_a_stage_of_another_job_is_not_taken_and_a_damaged_one_refused(tmp_path):
    FolderStore(tmp_path, "job").save(STAGE, StageResult(layers(mx.float16), {}))
    assert FolderStore(tmp_path, "other").load(STAGE, CLOCK) is None
    assert FolderStore(tmp_path / "empty", "job").load(STAGE, CLOCK) is None
    path = tmp_path / "block.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        FolderStore(tmp_path, "job").load(STAGE, CLOCK)
