"""Names, the noise floor, costs, and citations."""

import gc

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.evaluation import cost
from mlxquant.evaluation.contender import distinct
from mlxquant.evaluation.cost import measure_costs, peak, sizes
from mlxquant.evaluation.half_precision import HalfLinear, half_precision
from mlxquant.evaluation.report_folder import put
from mlxquant.layers.tree import parameters
from mlxquant.metrics.psnr import psnr
from mlxquant.progress import silent
from mlxquant.recipes.citations import cited
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sampling.guidance import Guidance

PROMPT = mq.Prompt(7, "a large red circle at left on white background")


def test_names_are_told_apart_also_as_folders():
    assert distinct(["a", "A", "a", "x/y", "x-y", "..", "@"]) == [
        ("a", "a"), ("A-2", "A-2"), ("a-3", "a-3"), ("x/y", "x-y"), ("x-y", "x-y-2"), ("..", "model"), ("@", "model-2"),
    ]  # fmt: skip


def test_half_linear_rounds_what_it_reads_and_writes():
    rng = np.random.default_rng(0)
    linear = nn.Linear(5, 3)
    weight, bias, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (3,), (4, 5)))
    linear.weight, linear.bias = mx.array(weight), mx.array(bias)
    halves = [a.astype(np.float16).astype(np.float64) for a in (x, weight, bias)]
    expected = (halves[0] @ halves[1].T + halves[2]).astype(np.float16)
    y = HalfLinear(linear)(mx.array(x))
    assert y.dtype == mx.float32
    assert (np.array(y) == expected).mean() > 0.9  # float32 sums round the other way now and then
    np.testing.assert_allclose(np.array(y), expected, rtol=2e-3)


def test_the_noise_floor_is_near_but_not_the_same(tiny):
    before = tiny.adapter.fingerprint
    exact, half = tiny.images([PROMPT], steps=2), half_precision(tiny).images([PROMPT], steps=2)
    assert 40 < psnr(half, exact)[0] < 100
    assert tiny.adapter.fingerprint == before
    np.testing.assert_array_equal(tiny.images([PROMPT], steps=2), exact)


def test_costs_are_medians_in_turns(tiny, monkeypatch):
    """A model twice as slow has twice the latency, whoever is first in a round."""
    order, slow = [], mq.Model(tiny.clone())

    def seconds(model, prompt, cfg):
        order.append(model is slow)
        return [2.0, 4.0, 60.0] if model is slow else [1.0, 2.0, 3.0]

    monkeypatch.setattr(cost, "step_seconds", seconds)
    monkeypatch.setattr(cost, "peak", lambda model, prompt, cfg: 7)
    first, second = measure_costs([tiny, slow], PROMPT, Guidance(2.0), silent)
    assert first == {"latency_s": 2, "latency_p95_s": 3, "latency_ratio": 1, "peak_bytes": 7}
    assert (second["latency_s"], second["latency_ratio"]) == (4, 2)
    assert set(zip(order[::2], order[1::2], strict=True)) == {(False, True), (True, False)}


def test_peak_counts_the_models_own_weights_and_nothing_of_others(tiny):
    gc.collect()  # arrays that earlier tests left in cycles would be freed while the model draws, and hide its peak
    own = sum(value.nbytes for value in parameters(tiny.adapter.module).values())
    alone = peak(tiny, PROMPT, Guidance(2.0))
    ballast = mx.zeros((1 << 22,))
    mx.eval(ballast)
    assert own < alone < own + 4 * ballast.nbytes
    assert peak(tiny, PROMPT, Guidance(2.0)) == pytest.approx(alone, rel=0.2)
    del ballast


def test_sizes_are_those_of_what_is_stored(tiny):
    facts = sizes(tiny)
    arrays = parameters(tiny.adapter.module).values()
    assert facts["model_bytes"] == sum(value.nbytes for value in arrays)  # random float32 does not fit into float16
    assert facts["bits_per_weight"] == 32
    assert facts["bits_per_quantized_weight"] is None


def test_methods_are_cited_with_their_source():
    names = {
        row["name"]: row["source"]
        for row in cited([parse_recipe("gptq-w4a8").to_dict(), parse_recipe("rtn-w4a8").to_dict()])
    }
    assert names == {"round gptq": "arXiv 2210.17323"}
    features = [row["name"] for row in cited([parse_recipe("mixed+progressive-w4a8").to_dict()])]
    assert {"mixed precision", "progressive alignment"} <= set(features)
    assert cited([parse_recipe("rtn-w4a8").to_dict()]) == []


def test_put_keeps_both_places(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("text")
    put(tmp_path / "a", tmp_path / "copy")
    put(tmp_path / "a" / "b" / "c", tmp_path / "new" / "d")
    assert (tmp_path / "copy" / "b" / "c").read_text() == (tmp_path / "new" / "d").read_text() == "text"
    (tmp_path / "a" / "b" / "c").unlink()
    assert (tmp_path / "copy" / "b" / "c").read_text() == "text"
