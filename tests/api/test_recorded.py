"""``quantize_module``: the codes that a hand-written adapter gives, on anybody's module, in place."""

import weakref
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, RecipeError
from mlxquant.layers.kinds import find_layers
from mlxquant.layers.tree import parameters
from mlxquant.models.recorded.watching import uncompiled
from mlxquant.recipes.roles import CAREFUL
from models.recorded.test_chain import inputs, recorded

from support import anybody
from support.anybody import seeded, tokens
from support.killed_sweep import killed_after
from support.same_layers import assert_same

PICTURES = [
    "rtn-w4a8",
    "gptq-w4a8",
    "qronos-w4a16",
    "gptq+svd4-w4a8",
    "gptq+envelope-w4a8",
    "mixed-w4a16",
    "adaround-w4a8",
]


@pytest.mark.parametrize("recipe", PICTURES)
def test_pictures_get_the_codes_of_the_hand_written_adapter(tiny, recipe):
    same_codes(tiny, recipe, 3)


def test_the_embedded_model_does(embedded):
    same_codes(embedded, "gptq-w4a8", 1)


def same_codes(model, name, steps):
    # careful layers are worth nearly the same bits here, and which of them get those hangs on the last digit
    kept = [f"@{role}=keep" for role in CAREFUL] if "mixed" in name else []
    recipe = mq.parse_recipe(name, kept)
    recipe = replace(recipe, learning=replace(recipe.learning, iterations=4, batch=1))
    calib = mq.calibrate(model, 2, steps=steps, cfg=1.0)
    _, states = calib.batches(model.adapter, 1)
    alone = OneByOne(calib)
    wanted = mq.quantize(model, alone, recipe).layers
    other = model.clone()
    each = [states[index] for index in range(len(states))]
    seen = recorded(other.module, *(((s["latent"], s["tokens"], s["pooled"], s["t"]), {}) for s in each))
    # the host leaves the patches out
    recipe = replace(recipe, rules=(("x_embedder.proj", None), *recipe.rules))
    report = mq.quantize_module(other.module, seen, recipe, time=lambda latent, tokens, pooled, t: t / 1000)
    assert_same(wanted, find_layers(other.module))
    assert len(report.blocks) == len(other.blocks)
    assert report.weighed == ("gradient" if "mixed" in name else "")


class OneByOne:
    """Calibration data whose batches are single pictures, as a recording of single pictures has them."""

    def __init__(self, calib):
        self._calib = calib

    def __getattr__(self, name):
        return getattr(self._calib, name)

    def batches(self, adapter, size=None):
        return self._calib.batches(adapter, 1)


@pytest.mark.parametrize("recipe", ["gptq-w4a8", "qronos-w4a16-g64", "rtn-w4a8-token"])
def test_text_gets_the_codes_of_the_hand_written_adapter(recipe):
    model = mq.load("gpt-python")
    calib = mq.calibrate_text(model, samples=8, length=32)
    wanted = mq.quantize(model, calib, recipe).layers
    _, states = calib.batches(model.adapter)
    other = model.clone()
    seen = recorded(other.module, *(((states[index]["tokens"],), {}) for index in range(len(states))))
    mq.quantize_module(other.module, seen, recipe)
    assert_same(wanted, find_layers(other.module))


KINDS = [
    anybody.Autoencoder,
    anybody.Plain,
    anybody.Conditioned,
    anybody.Skips,
    anybody.EncoderDecoder,
    anybody.WritesInto,
    anybody.Twice,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["gptq-w3a16", "rtn-w4a8", "qronos-w4a8-token", "mixed-w3a16"])
def test_any_module_runs_quantized_and_near(kind, recipe):
    module = seeded(kind)
    calls = inputs(kind)
    seen = recorded(module, *calls)
    report = mq.quantize_module(module, seen, recipe)
    found = find_layers(module)
    assert {id(found[layer.path]) for layer in report.sizes.layers} == {id(layer) for layer in found.values()}
    assert all(not one.kind.startswith(("Linear", "Conv")) for one in report.sizes.kept)
    for index, (args, kwargs) in enumerate(calls):
        exact, got = only(seen[index].result), only(module(*args, **kwargs))
        assert 0 < float(mx.abs(got - exact).max()) < 0.5 * float(mx.abs(exact).max())


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "qronos-w4a8-token", "rtn-w4a8-static"])
def test_layers_that_one_call_alone_reaches_are_quantized(recipe):
    module = seeded(anybody.Guided)
    calls = [((tokens(seed),), {}) for seed in range(5)]
    seen = recorded(module, *calls, ((tokens(5),), {"guidance": mx.ones((2, 1))}))
    report = mq.quantize_module(module, seen, recipe)
    assert "guidance_in" in find_layers(module)
    assert [(one.path, one.reason) for one in report.sizes.kept] == [
        ("idle", "what it wrote changed nothing that the module returned")
    ]


def only(result):
    return result["velocity"] if isinstance(result, dict) else result


def test_gptq_writes_less_error_than_rounding_to_nearest():
    errors = {}
    for method in ("rtn", "gptq"):
        module = seeded(anybody.Conditioned)
        calls = [
            ((tokens(s, 4, 32, 6), tokens(99 + s, 4, 8, 5)), {"t": mx.array([0.1, 0.3, 0.5, 0.9])}) for s in range(4)
        ]
        seen = recorded(module, *calls)
        mq.quantize_module(module, seen, f"{method}-w3a16")
        errors[method] = sum(
            float(mx.square(module(*args, **kwargs)["velocity"] - seen[i].result["velocity"]).sum())
            for i, (args, kwargs) in enumerate(calls)
        )
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_what_was_saved_comes_back(tmp_path):
    module = seeded(anybody.Skips)
    calls = [((tokens(s, 2, 4, 6), mx.full((2,), 0.2 + 0.3 * s)), {}) for s in range(3)]
    seen = recorded(module, *calls)
    mq.quantize_module(module, seen, "gptq-w4a8", time=lambda x, t: t)
    wanted = [np.array(module(*args)) for args, _ in calls]
    assert {layer.table.sigma.size for layer in find_layers(module).values() if layer.table is not None} == {3}
    file = mq.save_module(module, tmp_path / "model.safetensors")
    fresh = anybody.Skips()
    with pytest.raises(ArtifactError, match="tables of 3 noise levels; pass time="):
        mq.load_module(fresh, file)
    mq.load_module(fresh, file, time=lambda x, t: t)
    for (args, _), output in zip(calls, wanted, strict=True):
        np.testing.assert_array_equal(np.array(fresh(*args)), output)
    assert type(fresh).__name__ == "Skips"
    assert isinstance(fresh, anybody.Skips)


def test_static_tables_need_no_clock(tmp_path):
    module = seeded(anybody.Plain)
    calls = inputs(anybody.Plain)
    mq.quantize_module(module, recorded(module, *calls), "gptq-w4a8")
    file = mq.save_module(module, tmp_path / "model.safetensors")
    fresh = mq.load_module(anybody.Plain(), file)
    for args, _ in calls:
        np.testing.assert_array_equal(np.array(fresh(*args)), np.array(module(*args)))


@pytest.mark.parametrize("recipe", ["gptq-w4a8", "mixed-w4a16", "adaround-w4a16"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, recipe):
    recipe = mq.parse_recipe(recipe)
    recipe = replace(recipe, learning=replace(recipe.learning, iterations=5))
    files = []
    for killed in (False, True):
        module = seeded(anybody.Conditioned)
        seen = recorded(module, *inputs(anybody.Conditioned))
        work = tmp_path / f"work{killed}"
        if killed:
            before = dict(parameters(module))
            with killed_after(3):
                mq.quantize_module(module, seen, recipe, work=work)
            assert not find_layers(module)  # as it was
            assert all(value is before[name] for name, value in parameters(module).items())
            assert len(list(work.glob("*.safetensors"))) >= 3
        mq.quantize_module(module, seen, recipe, work=work)
        files.append(mq.save_module(module, tmp_path / f"{killed}.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("restores", [False, True])
def test_layers_give_their_memory_back_as_they_go(restores):
    module = seeded(anybody.Plain)
    seen = recorded(module, *inputs(anybody.Plain))
    weights = [weakref.ref(layer.weight) for _, layer in block_layers(module.blocks[0])]
    alive = dict[str, int]()

    def watch(items, label):
        alive[label] = sum(weight() is not None for weight in weights)
        return items

    mq.quantize_module(module, seen, "gptq-w4a16", restores=restores, progress=watch)
    assert weights
    assert alive["blocks.0: calibrated"] == len(weights)
    assert alive["blocks.1: calibrated"] == (len(weights) if restores else 0)


def block_layers(block):
    return [(path, layer) for path, layer in block.named_modules() if isinstance(layer, nn.Linear)]


class Undifferentiable(anybody.Plain):
    """Its last norm has no gradient."""

    def __call__(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(_no_gradient(self.norm(h)))


@mx.custom_function
def _no_gradient(x):
    return x * 1.0


@_no_gradient.vjp
def _refuse(primals, cotangent, output):
    raise ValueError("[Primitive::vjp] Not implemented for Custom.")


def test_without_a_gradient_errors_are_weighed_by_blocks():
    module = seeded(Undifferentiable)
    report = mq.quantize_module(module, recorded(module, *inputs(anybody.Plain)), "mixed-w3a16")
    assert report.weighed == "block errors"
    assert "weighed by block errors" in str(report)
    widths = {layer.format.bits for layer in find_layers(module).values()}
    assert len(widths) > 1


def test_time_has_to_be_one_level_of_a_call():
    module = seeded(anybody.Skips)
    seen = recorded(module, ((tokens(0, 2, 4, 6), mx.array([0.1, 0.2])), {}))
    with pytest.raises(CalibrationError, match=r"call 0: time= gives \[0\.1.*0\.2.*\]; expected one noise level"):
        mq.quantize_module(module, seen, "gptq-w4a8", time=lambda x, t: t)
    with pytest.raises(CalibrationError, match=r"time= gives \[100\.0, 200\.0\]"):
        mq.quantize_module(module, seen, "gptq-w4a8", time=lambda x, t: t * 1000)
    with pytest.raises(
        CalibrationError, match=r"call 0: time= reads no noise level from it \(TypeError: .*1 positional"
    ):
        mq.quantize_module(module, seen, "gptq-w4a8", time=lambda x: 0.5)


def test_time_may_be_bfloat16_and_needs_values():
    """Pipelines in bfloat16 have times in it, which NumPy does not know."""
    module = seeded(anybody.Skips)
    calls = [((tokens(seed, 2, 4, 6), mx.full((2,), 0.25 * (1 + seed), mx.bfloat16)), {}) for seed in range(2)]
    mq.quantize_module(module, recorded(module, *calls), "rtn-w4a8", time=lambda x, t: t)
    (args, kwargs), _ = calls
    assert module(*args, **kwargs).shape == (2, 4, 6)
    with pytest.raises(CalibrationError, match=r"a call of Skips: time= reads no noise level.*mx\.disable_compile"):
        mx.compile(module)(*args)


def test_bad_input_is_one_clear_error():
    module, other = seeded(anybody.Plain), seeded(anybody.Plain)
    with mq.recording(module) as nothing:
        pass
    with pytest.raises(CalibrationError, match="nothing was recorded: Plain was not called inside of"):
        mq.quantize_module(module, nothing, "gptq-w4a8")
    with (
        mq.recording(module) as going_on,
        pytest.raises(CalibrationError, match="calls of Plain are still being recorded; quantize it after"),
    ):
        module(tokens(0, width=6))
        mq.quantize_module(module, going_on, "gptq-w4a8")
    seen = recorded(module, *inputs(anybody.Plain))
    with pytest.raises(CalibrationError, match="the recording is of another module"):
        mq.quantize_module(other, seen, "gptq-w4a8")
    with pytest.raises(RecipeError, match=r"'tdq' is about how inputs change with the noise level.*time="):
        mq.quantize_module(module, seen, "gptq+tdq-w4a8")
    with pytest.raises(RecipeError, match="leave out 'progressive'"):
        mq.quantize_module(module, seen, "gptq+progressive-w4a8")
    with pytest.raises(RecipeError, match="unknown recipe"):
        mq.quantize_module(module, seen, "best")
    with pytest.raises(AdapterError, match=r"roles: Plain has no layer 'blocks\.9\.fc1'; it has "):
        mq.quantize_module(module, seen, "gptq-w4a8", roles={"blocks.9.fc1": "output"})
    assert not find_layers(module)
    mq.quantize_module(module, seen, "rtn-w8a16")
    with pytest.raises(AdapterError, match=r"Plain is quantized already \(.*\); build it anew, in full precision"):
        mq.quantize_module(module, seen, "rtn-w8a16")


def test_a_module_that_compiles_runs_quantized_unless_it_was_traced_before():
    """A trace has the weights of its time in it; nothing tells it that layers are others by now."""
    module, x = seeded(anybody.Compiled), tokens(0, width=6)
    seen = recorded(module, ((x,), {}))
    exact = seen[0].result
    mq.quantize_module(module, seen, "rtn-w4a16", blocks=["net.blocks.0", "net.blocks.1", "net.blocks.2"])
    wrote = module(x)
    with uncompiled():
        assert bool(mx.allclose(wrote, module(x), atol=1e-5))
    assert not bool(mx.allclose(wrote, exact, atol=1e-3))
    traced = seeded(anybody.Compiled)
    traced(x)
    with pytest.raises(AdapterError, match=r"Compiled holds functions that mx\.compile has traced already, with the"):
        mq.quantize_module(traced, recorded(traced, ((x,), {})), "rtn-w4a16")
    assert not find_layers(traced)


def test_unreached_layers_stay_and_the_report_says_so():
    module = seeded(anybody.Chooses)
    seen = recorded(module, ((tokens(0),), {"skip": True}))
    report = mq.quantize_module(module, seen, "gptq-w4a16")
    kept = {layer.path: layer.reason for layer in report.sizes.kept}
    assert kept == {f"blocks.0.{name}": "no recorded call reached it" for name in ("fc1", "fc2")}
    assert "no recorded call reached it" in str(report)
    assert report.to_dict()["sizes"]["after"] == report.sizes.after


def test_a_layer_with_two_parents_stays_and_the_report_says_so():
    module = seeded(anybody.Tied)
    calls = inputs(anybody.Tied)
    report = mq.quantize_module(module, recorded(module, *calls), "gptq-w4a16")
    assert module.blocks[0].fc1 is module.blocks[1].fc1
    assert {layer.path for layer in report.sizes.layers} == {"blocks.0.fc2", "blocks.1.fc2"}
    assert "one layer at several places: blocks.0.fc1, blocks.1.fc1" in str(report)


def test_quantized_layers_of_mlx_are_left_alone():
    module = seeded(anybody.Plain, 2, 64)
    nn.quantize(module.blocks[0], 64, 4)
    report = mq.quantize_module(module, recorded(module, *inputs(anybody.Plain)), "gptq-w4a16")
    assert {layer.path for layer in report.sizes.layers} == {"embed", "out", "blocks.1.fc1", "blocks.1.fc2"}


class Penultimate(anybody.Plain):
    """Returns what enters its last block, as encoders of texts do: the block runs, and nobody reads it."""

    def __call__(self, x):
        h = before = self.embed(x)
        for block in self.blocks:
            before, h = h, block(h)
        return self.out(self.norm(before))


def test_a_last_block_that_nobody_reads_is_no_error():
    module = seeded(Penultimate)
    report = mq.quantize_module(module, recorded(module, *inputs(anybody.Plain)), "gptq-w4a16")
    kept = {one.path: one.reason for one in report.sizes.kept}
    last = f"blocks.{len(module.blocks) - 1}"
    quantized = {one.path for one in report.sizes.layers}
    assert any(path.startswith("blocks.0") for path in quantized)
    assert all(path.startswith(last) for path in kept)
