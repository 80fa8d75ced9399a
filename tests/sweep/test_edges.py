"""Edges into norms' gains and into columns of what a layer reads: folding by them leaves the function, and what recipes
do by them is kept, saved and found again.
"""

import mlxquant as mq

# isort: split
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import AdapterError, NumericsError
from mlxquant.layers.tree import get_module, parameters, tapped
from mlxquant.models.edges import Edge, Fold, check_edges, whole, written_by
from mlxquant.numerics.hadamard import block_size
from mlxquant.numerics.transform import Transform
from mlxquant.sweep.folding import check_folds, divide, fold, foldable

from support.by_hand import HEADS, NORMS, WIDE, ByHand, D

BLOCK = "blocks.1"


@pytest.fixture(params=NORMS)
def adapter(request):
    return ByHand.pretrained(request.param)


def given(adapter, rows=2):
    conditioning = adapter.encode(["a house", "trees"][:rows])
    noise = mx.random.normal((rows, *adapter.latent_shape), key=mx.random.key(5))
    return adapter.state(noise, conditioning, 0.6)


def velocity(adapter):
    return np.array(adapter.run(given(adapter), 0.6)["velocity"])


def edges(adapter):
    """Of one block: into q, k, v and up; into the attention columns of out; into its GELU columns."""
    return [edge for edge in adapter.edges() if edge.name.startswith(BLOCK)]


def snapshot(adapter):
    return {name: np.array(value) for name, value in parameters(adapter.module).items()}


def inputs(adapter, path):
    seen = {}
    with tapped(adapter.module, [path], lambda path, x, *more: seen.update({path: np.array(x)})):
        velocity(adapter)
    return seen[path]


def test_a_division_goes_into_a_norms_gains_and_biases_and_comes_out_again(adapter):
    edge, exact, before = edges(adapter)[0], velocity(adapter), snapshot(adapter)
    d = np.exp(np.random.default_rng(0).uniform(-1.5, 1.5, D)).astype(np.float32)
    seen = inputs(adapter, edge.consumers[0])
    undo = divide(adapter.module, edge, d)
    changed = {name for name, value in snapshot(adapter).items() if not np.array_equal(value, before[name])}
    norm = get_module(adapter.module, f"{BLOCK}.norm")
    assert changed == {f"{path}.weight" for path in edge.consumers} | {f"{BLOCK}.norm.{name}" for name in norm}
    np.testing.assert_allclose(inputs(adapter, edge.consumers[0]) * d, seen, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(velocity(adapter) - exact) < 1e-5 * np.linalg.norm(exact)
    undo()
    for name, value in snapshot(adapter).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("bias", [False, True])
def test_a_gain_that_is_used_as_one_plus_itself_is_divided_as_such(bias):
    """As in Gemma's norms; a bias beside it is used as it is."""
    model = nn.Module()
    model.norm, model.fc = nn.LayerNorm(8, bias=bias), nn.Linear(8, 4)
    model.norm.update({k: mx.random.normal(v.shape) * 0.1 for k, v in model.norm.parameters().items()})
    x = mx.random.normal((3, 8))
    run = lambda: np.array(model.fc(mx.fast.layer_norm(x, 1 + model.norm.weight, model.norm.get("bias"), 1e-5)))  # noqa: E731
    exact = run()
    undo = divide(model, Edge(("fc",), (Fold("norm", 0, 8, plus_one=True),)), np.linspace(0.5, 2, 8).astype(np.float32))
    np.testing.assert_allclose(run(), exact, rtol=1e-4, atol=1e-5)
    undo()
    np.testing.assert_array_equal(run(), exact)


def test_a_norm_absorbs_no_rotation_and_no_order(adapter):
    edge = edges(adapter)[0]
    assert foldable(edge, Transform(block=4)).block == 1
    lies = replace(edge, mixes=16), replace(edge, reorders=edge.folds)
    for wrong, transform in zip(lies, (Transform(block=4), Transform(order=np.arange(D)[::-1])), strict=True):
        before = snapshot(adapter)
        with pytest.raises(
            ValueError, match="is a norm, which can absorb a division and neither a mixing nor an order"
        ):
            fold(adapter.module, wrong, transform)
        for name, value in snapshot(adapter).items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("what", ["divided", "mixed", "reordered"])
def test_columns_are_folded_and_the_others_stay(adapter, what):
    _, attention, mlp = edges(adapter)
    rng = np.random.default_rng(0)
    edge, transform = {
        "divided": (attention, Transform(rng.uniform(0.3, 3, D).astype(np.float32))),
        "mixed": (attention, Transform(block=block_size(D // HEADS))),
        "reordered": (mlp, Transform(order=rng.permutation(WIDE))),
    }[what]
    exact, before, seen = velocity(adapter), snapshot(adapter), inputs(adapter, f"{BLOCK}.out")
    undo = fold(adapter.module, edge, transform)
    now, other = inputs(adapter, f"{BLOCK}.out"), slice(D, None) if edge is attention else slice(D)
    np.testing.assert_allclose(now[..., edge.part], transform.inputs(seen[..., edge.part]), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(now[..., other], seen[..., other])
    weight = np.array(get_module(adapter.module, f"{BLOCK}.out").weight)
    np.testing.assert_array_equal(weight[:, other], before[f"{BLOCK}.out.weight"][:, other])
    assert np.linalg.norm(velocity(adapter) - exact) < 1e-5 * np.linalg.norm(exact)
    undo()
    for name, value in snapshot(adapter).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_convolution_of_one_pixel_reads_channels_and_a_larger_one_patches():
    """As between a UNet's GroupNorm and the projection into its transformer."""
    model = nn.Module()
    model.norm, model.proj, model.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3)
    model.norm.weight, x = mx.random.normal((8,)), mx.random.normal((2, 5, 5, 8))
    run = lambda: np.array(model.proj(model.norm(x)))  # noqa: E731
    exact, edge = run(), Edge(("proj",), (Fold("norm", 0, 8),))
    check_edges("unet", model, [edge])
    undo = divide(model, edge, np.linspace(0.5, 2, 8).astype(np.float32))
    np.testing.assert_allclose(run(), exact, rtol=1e-4, atol=1e-5)
    undo()
    np.testing.assert_array_equal(run(), exact)
    with pytest.raises(
        AdapterError, match=r"conv is no layer that reads channels one by one \(a convolution reads pat"
    ):
        check_edges("unet", model, [replace(edge, consumers=("conv",))])


def test_a_divisor_has_the_width_of_the_columns(adapter):
    with pytest.raises(NumericsError, match=rf"{BLOCK}.out\[0:{D}\]: a divisor of shape .* for {D} channels"):
        divide(adapter.module, edges(adapter)[1], np.ones(D + WIDE, np.float32))


def test_who_wrote_what_and_what_is_whole(adapter):
    assert written_by(edges(adapter)) == {f"{BLOCK}.out": [((D, D + WIDE), "gelu")]}
    assert [edge.name for edge in whole(edges(adapter))] == [f"{BLOCK}.q"]


OUT, V, UP, NORM = (f"{BLOCK}.{name}" for name in ("out", "v", "up", "norm"))
LIES = {
    "no layer": (Edge((f"{BLOCK}.gone",)), r"no module 'blocks.1.gone'"),
    "nobody": (Edge(()), "an edge: it has no consumers"),
    "a norm reads": (Edge((NORM,)), r"blocks.1.norm is read as a consumer, but its weight is a vector \[32\]"),
    "no rows": (Edge((OUT,), (Fold(V, 8, 40),), columns=(0, D)), "rows 8 to 40 are not among the 32 of blocks.1.v"),
    "width": (Edge((OUT,), (Fold(V, 0, D),)), "blocks.1.v writes 32 channels of it, and it has 96"),
    "no tensor": (Edge((OUT, V)), "its consumers read 32 and 96 channels, and not one tensor"),
    "columns": (Edge((OUT,), columns=(64, 97)), "columns 64 to 97 are not among the 96 that blocks.1.out reads"),
    "backwards": (Edge((OUT,), columns=(64, 32)), "columns 64 to 32 are not among"),
    "runs": (Edge((OUT,), (Fold(V, 0, D),), mixes=5, columns=(0, D)), "runs of 5 channels do not divide its 32"),
    "norm mixes": (Edge((UP,), (Fold(NORM, 0, D),), mixes=16), "blocks.1.norm is a norm, which can absorb a division"),
    "1 + y": (Edge((OUT,), (Fold(V, 0, D, True),), columns=(0, D)), "blocks.1.v has no bias, and cannot absorb"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_edge_that_cannot_be_is_one_error_that_names_it(lie):
    edge, said = LIES[lie]
    with pytest.raises(AdapterError, match=rf"^by-hand: .*{said}.*; correct the adapter's edges$"):
        check_edges("by-hand", ByHand.pretrained().module, [edge])


def test_channels_that_two_edges_speak_of_are_an_error():
    said = rf"the edge into {OUT}\[31:96\]: {OUT} reads its columns 31 to 96 by it, and by {OUT}\[0:32\] as well"
    with pytest.raises(AdapterError, match=said):
        check_edges("by-hand", ByHand().module, [Edge((OUT,), columns=(0, D)), Edge((OUT,), columns=(D - 1, D + WIDE))])

    def edges(self):
        return (Edge((V,), (Fold("blocks.0.norm", 0, D),)),)


@pytest.mark.parametrize(
    ("edge", "what"),
    [
        (Edge((V,), (Fold(NORM, 0, D),)), "divided"),  # q, k and up read it, too
        (Edge((OUT,), (Fold(V, 0, D),), mixes=D, columns=(0, D)), "mixed"),  # over heads
        (Edge((OUT,), reorders=(Fold(UP, 0, D),), columns=(0, D)), "put in another order"),
    ],
)
def test_an_edge_that_lies_is_found_out(edge, what, monkeypatch):
    adapter = ByHand.pretrained()
    monkeypatch.setattr(adapter, "edges", lambda: (edge,))
    before = snapshot(adapter)
    with pytest.raises(AdapterError, match=rf"edge into .* is not true: with its channels {what} in all .* moves by"):
        check_folds(adapter, given(adapter), 0.6)
    for name, value in snapshot(adapter).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_recipe_is_refused_before_anything_is_folded():
    adapter = ByHand.pretrained()
    adapter.edges = lambda: (Edge((OUT,), columns=(0, 1000)),)
    model = mq.Model(adapter)
    with pytest.raises(AdapterError, match="columns 0 to 1000 are not among the 96"):
        mq.quantize(model, mq.calibrate(model, prompts=1, steps=2), "rtn-w4a8")
