"""Chains are found in anybody's modules, and run to what was recorded, bit for bit."""

import gc
import re

import mlx.core as mx
import pytest

import mlxquant as mq
from mlxquant.errors import AdapterError
from mlxquant.models.recorded.adapter import CALL, RecordedAdapter

from support import anybody
from support.anybody import seeded, tokens


def recorded(module, *calls):
    """A recording of calls, each (args, kwargs)."""
    with mq.recording(module) as seen:
        for args, kwargs in calls:
            mx.eval(module(*args, **kwargs))
    return seen


def time(seed, rows=2):
    return mx.random.uniform(shape=(rows,), key=mx.random.key(100 + seed))


def inputs(kind):
    """Two calls of different shapes."""
    if kind in (anybody.Plain, anybody.PassesOn):
        return [((tokens(0, width=6),), {}), ((tokens(1, 1, 9, 6),), {})]
    if kind is anybody.Conditioned:
        return [((tokens(s, 2, 4 + s, 6), tokens(9 + s, 2, 3, 5)), {"t": time(s)}) for s in range(2)]
    if kind is anybody.Skips:
        return [((tokens(s, 2, 4 + s, 6), time(s)), {}) for s in range(2)]
    if kind is anybody.EncoderDecoder:
        return [((tokens(s, 2, 4, 6), tokens(9 + s, 2, 3 + s, 6)), {}) for s in range(2)]
    if kind is anybody.Autoencoder:
        return [((mx.random.normal((2, 8, 8 + 2 * s, 3), key=mx.random.key(s)),), {}) for s in range(2)]
    return [((tokens(s, 2, 4 + s),), {}) for s in range(2)]


BLOCKS = {
    anybody.Plain: ["blocks.0", "blocks.1", "blocks.2"],
    anybody.Conditioned: ["double.0", "double.1", "single.0", "single.1"],
    anybody.Skips: ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "up.0", "up.1"],
    anybody.EncoderDecoder: ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
    anybody.PassesOn: ["blocks.0", "blocks.1"],
    anybody.Chooses: ["blocks.0", "blocks.1", "blocks.2"],
    anybody.WritesInto: ["blocks.0", "blocks.1", "blocks.2"],
    anybody.Autoencoder: ["blocks.0", "blocks.1"],
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_chain_is_found_and_computes_what_was_recorded(kind, dtype):
    module = seeded(kind)
    module.set_dtype(dtype)
    seen = recorded(module, *inputs(kind))
    adapter = RecordedAdapter(seen)
    assert [stage.name for stage in adapter.blocks] == BLOCKS[kind]
    assert not adapter.broken
    adapter._widens = False
    for index in range(len(seen)):
        results = adapter._results(seen[index].result)
        got = adapter.run(adapter.state(index), 0.0)
        assert results.keys() == got.keys()
        assert all(bool(mx.array_equal(got[key], value)) for key, value in results.items())


def test_stages_hand_on_what_later_ones_need_and_nothing_else():
    """Of a chain that is the last output; of skips all that wait."""
    seen = recorded(seeded(anybody.Plain), *inputs(anybody.Plain))
    adapter = RecordedAdapter(seen)
    state = adapter.state(0)
    for stage in adapter.stages[:-1]:
        state = stage.run(state)
        assert len(state) == 2
        assert CALL in state
    adapter = RecordedAdapter(recorded(seeded(anybody.Skips), *inputs(anybody.Skips)))
    state, held = adapter.state(0), {}
    for stage in adapter.stages:
        state = stage.run(state)
        held[stage.name] = len(state) - 1
    assert held["down.0.1"] == 2  # the skip, which is the next block's input, and the conditioning
    assert held["down.1.1"] == 2  # two skips; no block reads the conditioning any more
    assert held["up.0"] == 2
    assert held["up.1"] == 1


def test_a_chain_keeps_no_hidden_states():
    """A real transformer writes gigabytes of them in one call."""
    module = seeded(anybody.Plain)
    seen = recorded(module, ((tokens(0, 4, 5000, 6),), {}))
    gc.collect()
    before = mx.get_active_memory()
    adapter = RecordedAdapter(seen)
    gc.collect()
    assert len(adapter.blocks) == 3
    assert mx.get_active_memory() - before < 4 * 5000 * 16 * 4  # one of them


def test_layers_outside_of_blocks_belong_where_they_first_matter():
    """The shared modulation of single blocks is computed before the double ones, and shows at the first single one."""
    adapter = RecordedAdapter(recorded(seeded(anybody.Conditioned), *inputs(anybody.Conditioned)))
    assert adapter.chain.glue == {"image_in": 0, "text_in": 0, "time_in": 0, "single_mod": 2, "out": 4}
    names = [stage.name for stage in adapter.stages]
    assert names == ["before double.0", "double.0", "double.1", "before single.0", "single.0", "single.1", "result"]
    assert {path: adapter.role(path) for path in ("image_in", "single_mod", "out")} == {
        "image_in": "embedder",
        "single_mod": "modulation",
        "out": "output",
    }
    assert adapter.role("double.0.x.mod") == "modulation"
    assert adapter.role("double.0.x.fc1") == "mlp"
    skips = RecordedAdapter(recorded(seeded(anybody.Skips), *inputs(anybody.Skips)))
    assert skips.role("middle.fc1") == "mlp"  # between blocks, in no list


def test_layers_of_some_calls_alone_have_a_place_and_those_without_effect_are_named():
    """A strength of guidance is embedded in the last of six calls, of which four would be looked at."""
    calls = [((tokens(seed),), {}) for seed in range(6)]
    calls[5] = ((tokens(5),), {"guidance": mx.ones((2, 1))})
    adapter = RecordedAdapter(recorded(seeded(anybody.Guided), *calls))
    assert adapter.chain.glue == {"into": 0, "guidance_in": 0, "out": 2}
    assert adapter.left_out() == {"idle": "what it wrote changed nothing that the module returned"}
    assert "idle" not in adapter.layers()


def test_a_layer_that_is_the_first_or_the_last_block_alone_embeds_or_is_output():
    """As the convolutions at both ends of a UNet, which stand in its lists."""
    adapter = RecordedAdapter(recorded(seeded(anybody.Ends), *inputs(anybody.Plain)))
    roles = {path: adapter.role(path) for path in adapter.layers()}
    assert roles.pop("blocks.0.only") == "embedder"
    assert roles.pop("blocks.3.only") == "output"
    assert set(roles.values()) == {"mlp"}


def test_the_exact_stream_sees_no_quantized_glue():
    """A layer of the glue that was replaced already runs as it was inside of ``exactly``."""
    module = seeded(anybody.Conditioned)
    adapter = RecordedAdapter(recorded(module, *inputs(anybody.Conditioned)))
    exact = adapter.run(adapter.state(0), 0.0)["result.velocity"]
    before, module.time_in = module.time_in, seeded(anybody.nn.Linear, 8, 16)
    changed = adapter.run(adapter.state(0), 0.0)["result.velocity"]
    with adapter.exactly():
        again = adapter.run(adapter.state(0), 0.0)["result.velocity"]
    assert not bool(mx.array_equal(changed, exact))
    assert bool(mx.array_equal(again, exact))
    assert module.time_in is not before


@pytest.mark.parametrize(
    ("kind", "calls", "why"),
    [
        (anybody.Twice, None, r"block blocks\.\d is called more than once"),
        (anybody.Chooses, [((tokens(0),), {}), ((tokens(1),), {"skip": True})], "call 1 differs from call 0"),
    ],
)
def test_what_is_no_chain_runs_whole_and_says_why(kind, calls, why):
    seen = recorded(seeded(kind), *(calls or inputs(kind)))
    adapter = RecordedAdapter(seen)
    assert adapter.chain is None
    assert [stage.name for stage in adapter.stages] == ["whole"]
    assert re.search(why, adapter.broken)


def test_other_weights_and_random_numbers_are_found_out():
    module = seeded(anybody.Plain)
    seen = recorded(module, *inputs(anybody.Plain))
    module.out = anybody.nn.Linear(16, 6)
    with pytest.raises(AdapterError, match=r"Plain: call 0, made again block by block, differs by [\d.]+ from"):
        RecordedAdapter(seen)
    random = seeded(anybody.Random)
    with pytest.raises(AdapterError, match="draws random numbers"):
        RecordedAdapter(recorded(random, *inputs(anybody.Random)))


def test_a_compiled_call_is_seen_and_compiling_goes_on_afterwards():
    outer = seeded(anybody.Compiled)
    x = tokens(0, width=6)
    before = outer(x)
    with mq.recording(outer.net) as seen:
        outer(x)
        outer(x)
    assert len(seen) == 2
    assert bool(mx.allclose(seen[1].result, before))
    calls = []

    def probe(value):
        calls.append(1)
        return value + 1

    compiled = mx.compile(probe)
    compiled(x), compiled(x)
    assert len(calls) == 1


def test_blocks_can_be_named():
    seen = recorded(seeded(anybody.Skips), *inputs(anybody.Skips))
    adapter = RecordedAdapter(seen, blocks=["middle", "up.1"])
    assert [stage.name for stage in adapter.blocks] == ["middle", "up.1"]
    assert RecordedAdapter(seen, blocks=()).broken == "no blocks were wanted"
    with pytest.raises(AdapterError, match=r"blocks: Skips has no module 'side'; it has \w+"):
        RecordedAdapter(seen, blocks=["side"])
    with pytest.raises(AdapterError, match=r"expected a list of paths, found the text 'middle'; pass \['middle'\]"):
        RecordedAdapter(seen, blocks="middle")
    with pytest.raises(AdapterError, match=r"'down\.0\.0\.fc1' stands inside of another block"):
        RecordedAdapter(seen, blocks=["down.0.0", "down.0.0.fc1"])
    seen = recorded(seeded(anybody.Chooses), ((tokens(0),), {"skip": True}))
    with pytest.raises(AdapterError, match=r"blocks: a call of Chooses does not run blocks\.0; leave that out"):
        RecordedAdapter(seen, blocks=["blocks.0", "blocks.1"])


def test_a_module_without_lists_says_what_to_do():
    layer = anybody.Narrow(8)
    with pytest.raises(AdapterError, match=r"Narrow has no list of modules.*blocks=\[\.\.\.\], or pass blocks=\(\)"):
        RecordedAdapter(recorded(layer, ((tokens(0, width=16),), {})))


def test_a_block_whose_class_calls_that_of_another_is_called_once():
    seen = recorded(seeded(anybody.PassesOn), *inputs(anybody.PassesOn))
    adapter = RecordedAdapter(seen, blocks=["blocks.0.inner", "blocks.1.inner"])
    assert [stage.name for stage in adapter.blocks] == ["blocks.0.inner", "blocks.1.inner"]
