"""Stage hooks: they see everything, change nothing, and are always gone afterwards."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.models.adapter import hooked
from mlxquant.models.stages import written

from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0"


@pytest.fixture
def adapter():
    return tiny_adapter()


@pytest.fixture
def inputs(adapter):
    text = adapter.encode([p.text for p in adapter.prompts("calibration", 2)])
    return mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(0)), text, 0.5


def names(adapter):
    return [stage.name for stage in adapter.stages]


def test_all_stages_are_seen_in_one_forward_pass_and_change_nothing(adapter, inputs):
    plain = np.array(adapter.velocity(*inputs))
    seen = []
    with hooked(adapter, names(adapter), lambda *shown: seen.append(shown)):
        shown = np.array(adapter.velocity(*inputs))
    np.testing.assert_array_equal(shown, plain)
    assert [name for name, _, _ in seen] == names(adapter)
    assert set(seen[0][1]) == {"latent", "tokens", "pooled", "t"}
    for (_, _, outputs), (_, following, _) in pairwise(seen):
        assert outputs is following
    np.testing.assert_array_equal(np.array(seen[-1][2]["velocity"]), plain)


def test_hooks_see_what_the_stage_itself_computes(adapter, inputs):
    seen = []
    with hooked(adapter, [BLOCK], lambda *shown: seen.append(shown)):
        adapter.velocity(*inputs)
    ((name, before, after),) = seen
    assert name == BLOCK
    stage = adapter.stages[1]
    with adapter.clock.at(0.5):
        again = stage.run(before)
    assert set(after) == set(again) == {"latent", "image", "text", "c"}
    for key, value in again.items():
        np.testing.assert_array_equal(np.array(after[key]), np.array(value))
    assert set(written(after, before)) == {"image", "text"}


def test_hooks_are_gone_afterwards_also_after_an_exception(adapter, inputs):
    seen = []

    def observe(name, before, after):
        seen.append(name)
        raise RuntimeError("observer failed")

    with pytest.raises(RuntimeError, match="observer failed"), hooked(adapter, names(adapter), observe):
        adapter.velocity(*inputs)
    assert seen == ["embed"]
    adapter.velocity(*inputs)
    assert seen == ["embed"]
    with pytest.raises(AdapterError, match="no timestep"):
        _ = adapter.clock.sigma


def test_hooks_nest_and_the_outer_ones_stay(adapter, inputs):
    seen = []
    with hooked(adapter, [BLOCK], lambda name, *_: seen.append("outer")):
        with hooked(adapter, [BLOCK], lambda name, *_: seen.append("inner")):
            adapter.velocity(*inputs)
        assert seen == ["outer", "inner"]
        adapter.velocity(*inputs)
    assert seen == ["outer", "inner", "outer"]


def test_the_module_tree_does_not_see_them(adapter, inputs):
    before = ([path for path, _ in adapter.module.named_modules()], adapter.fingerprint, list(adapter.layers()))
    with hooked(adapter, names(adapter), lambda *_: None):
        adapter.velocity(*inputs)
        assert (
            [path for path, _ in adapter.module.named_modules()],
            adapter.fingerprint,
            list(adapter.layers()),
        ) == before


def test_hooks_belong_to_one_adapter(adapter, inputs):
    other, seen = tiny_adapter(), []
    with hooked(adapter, [BLOCK], lambda name, *_: seen.append(name)):
        other.velocity(*inputs)
    assert seen == []


def test_unknown_stages_are_refused(adapter, inputs):
    with (
        pytest.raises(AdapterError, match=r"no stages \['mm7'\].*embed"),
        hooked(adapter, [BLOCK, "mm7"], lambda *_: None),
    ):
        pass
    adapter.velocity(*inputs)


def test_written_goes_by_identity_not_by_value():
    a = mx.ones(3)
    assert written({"same": a, "copy": mx.ones(3), "new": a}, {"same": a, "copy": mx.ones(3), "dropped": a}) == [
        "copy",
        "new",
    ]
