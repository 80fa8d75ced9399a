"""Folding: dividing any tensor that the adapter says can be divided leaves the model's output as it was."""

from dataclasses import replace

import mlxquant  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.layers.tree import get_module, parameters, tapped
from mlxquant.numerics.hadamard import block_size, rotated
from mlxquant.numerics.transform import Transform
from mlxquant.sweep.folding import divide, fold, foldable, remaining

from support.tiny_pictures import tiny_adapter

EDGES = tiny_adapter().edges()
FOLDED = [edge for edge in EDGES if edge.folds]


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


def velocity(adapter):
    rng = np.random.default_rng(0)
    latent = mx.array(rng.normal(size=(2, *adapter.latent_shape)).astype(np.float32))
    text = adapter.encode(["a large red circle at left on white background", ""])
    return np.array(adapter.velocity(latent, text, 0.6))


def snapshot(adapter):
    return {name: np.array(value) for name, value in parameters(adapter.module).items()}


def width(adapter, edge):
    return get_module(adapter.module, edge.consumers[0]).weight.shape[1]


def divisor(adapter, edge, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(-1.5, 1.5, width(adapter, edge))).astype(np.float32)


@pytest.mark.parametrize("edge", FOLDED, ids=lambda e: e.consumers[0])
def test_dividing_an_edge_leaves_the_velocity(adapter, edge):
    before, original = velocity(adapter), snapshot(adapter)
    undo = divide(adapter.module, edge, divisor(adapter, edge))
    after = velocity(adapter)
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)
    changed = {name for name, value in snapshot(adapter).items() if not np.array_equal(value, original[name])}
    assert {f"{path}.weight" for path in (*edge.consumers, *(fold.path for fold in edge.folds))} <= changed
    undo()
    for name, value in snapshot(adapter).items():
        np.testing.assert_array_equal(value, original[name])


@pytest.mark.parametrize("edge", FOLDED, ids=lambda e: e.consumers[0])
def test_consumers_really_see_the_divided_tensor(adapter, edge):
    """Folding into the wrong rows and undoing it in the wrong columns would cancel, too, if both were wrong
    together.
    """

    def inputs():
        seen = {}
        with tapped(adapter.module, edge.consumers, lambda path, x: seen.update({path: np.array(x)})):
            velocity(adapter)
        return seen

    d, before = divisor(adapter, edge), inputs()
    undo = divide(adapter.module, edge, d)
    after = inputs()
    undo()
    for path in edge.consumers:
        np.testing.assert_allclose(after[path] * d, before[path], rtol=1e-3, atol=1e-4 * np.abs(before[path]).max())


def test_all_edges_at_once(adapter):
    before = velocity(adapter)
    undone = [divide(adapter.module, edge, divisor(adapter, edge, seed)) for seed, edge in enumerate(FOLDED)]
    after = velocity(adapter)
    for undo in reversed(undone):
        undo()
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)


def test_edges_name_every_layer_of_attention_and_mlp_once(adapter):
    named = [path for edge in EDGES for path in edge.consumers]
    assert len(named) == len(set(named))
    assert set(named) == {path for path in adapter.layers() if adapter.role(path) in ("attention", "mlp")}
    assert all(edge.consumers[0].endswith("mlp.fc2") == (edge.after == "gelu") == (not edge.folds) for edge in EDGES)


def test_an_edge_without_folds_is_refused(adapter):
    edge = next(edge for edge in EDGES if not edge.folds)
    with pytest.raises(ValueError, match=r"nothing can absorb a division before .*fc2; divide while the model runs"):
        divide(adapter.module, edge, divisor(adapter, edge))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_bad_divisors_are_refused_and_change_nothing(adapter, bad):
    edge, original = FOLDED[0], snapshot(adapter)
    d = divisor(adapter, edge)
    for wrong in (np.where(np.arange(len(d)) == 3, np.float32(bad), d), d[:-1]):
        with pytest.raises(NumericsError, match="must be positive and finite"):
            divide(adapter.module, edge, wrong)
    for name, value in snapshot(adapter).items():
        np.testing.assert_array_equal(value, original[name])


def some_transform(adapter, edge):
    """Everything at once that any transform method may propose for an edge."""
    size = width(adapter, edge)
    order = np.random.default_rng(1).permutation(size) if edge.reorders else None
    return Transform(divisor(adapter, edge), order, edge.mixes if edge.mixes > 1 else block_size(size))


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.consumers[0])
def test_what_is_folded_and_what_is_left_to_the_layers_make_the_whole(adapter, edge):
    before, inputs = velocity(adapter), {}
    with tapped(adapter.module, edge.consumers, lambda path, x: inputs.update({path: np.array(x)})):
        velocity(adapter)
    transform = some_transform(adapter, edge)
    folded = foldable(edge, transform)
    rest = remaining(transform, folded)
    undo, seen = fold(adapter.module, edge, folded), {}
    with tapped(adapter.module, edge.consumers, lambda path, x: seen.update({path: np.array(x)})):
        after = velocity(adapter)
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)
    for path, x in inputs.items():
        wanted = transform.inputs(x)
        np.testing.assert_allclose(rest.inputs(seen[path]), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    undo()
    np.testing.assert_array_equal(velocity(adapter), before)


def test_rotations_of_values_are_free_and_channels_change_places_through_gelu():
    by_name = {edge.consumers[0].rpartition(".")[2]: edge for edge in EDGES}
    assert foldable(by_name["o_proj"], Transform(block=16)).block == 16
    assert foldable(by_name["o_proj"], Transform(block=64)).block == 1  # wider than a head
    assert foldable(by_name["q_proj"], Transform(block=16)).block == 1
    order = np.arange(128)[::-1]
    assert foldable(by_name["fc2"], Transform(order=order)).order is order
    assert remaining(Transform(order=order, block=64), Transform(order=order)).block == 64


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("mixes", [1, 6, 16, 24, 32, 48, 64, 96])
def test_a_rotation_is_folded_where_it_mixes_no_channels_of_two_heads(mixes, block):
    edge = replace(next(edge for edge in EDGES if edge.mixes > 1), mixes=mixes)
    head = np.arange(192) // mixes
    across = np.abs(rotated(np.eye(192), block))[head[:, None] != head]
    assert foldable(edge, Transform(block=block)).block == (1 if across.any() else block)


def test_what_cannot_be_folded_is_refused(adapter):
    edge = next(edge for edge in EDGES if edge.after == "gelu")
    with pytest.raises(ValueError, match=r"what writes the input of .*fc2 cannot absorb all"):
        fold(adapter.module, edge, Transform(block=16))
    with pytest.raises(ValueError, match="nothing can absorb the new order"):
        remaining(Transform(order=np.arange(4)), Transform())
