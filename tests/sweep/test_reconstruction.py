"""Block reconstruction on the real block: gradients, minibatches, modules put back, and learning that helps."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.errors import ArtifactError, RecipeError
from mlxquant.grids.reading import round_through
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import get_module
from mlxquant.methods.weights.adaround import Settings
from mlxquant.numerics.low_rank import LowRank
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep import store
from mlxquant.sweep import sweep as sweeping
from mlxquant.sweep.reconstruction import Minibatch, Reconstruction, SoftLayer
from mlxquant.sweep.rounding import Rounding
from mlxquant.sweep.streams import ExactStream
from mlxquant.sweep.sweep import Sweep
from mlxquant.sweep.trial import Job

SHORT = Settings(iterations=60, batch=4)
BLOCK = "multimodal_transformer_blocks.0"


def calibrate(model, prompts=2, steps=3):
    return mq.calibrate(model, prompts=prompts, steps=steps)


def recipe(name="taqdit-w4a8", learning=SHORT, **changes):
    made = replace(parse_recipe(name), learning=learning)
    return replace(made, rules=tuple((p, replace(s, **changes) if s.reconstruct else s) for p, s in made.rules))


@pytest.fixture
def block(tiny):
    """A reconstruction of the first block after its start was rounded to W4A8, the start's outputs, and the adapter."""
    adapter = tiny.adapter
    sigmas, states = calibrate(tiny).batches(adapter)
    embed, stage = adapter.stages[:2]
    passes = Passes(adapter, sigmas)
    inputs = passes.through(embed, states)
    teacher = ExactStream(passes, inputs)
    plan = recipe().plan(adapter.roles())
    job = Job(passes, recipe(), plan, teacher)
    targets = teacher.targets(stage)
    specs = {path: spec for path, spec in plan.items() if stage.owns(path)}
    start = Rounding(job, stage, specs, inputs, {}).first()[0]
    Sweep(job)._judge(stage, start, inputs, targets)
    work = Reconstruction(passes, stage, start.layers, start.goals, inputs, teacher, targets, SHORT)
    work.normalise(start.errors)
    return work, start, adapter


def test_rounding_passes_the_gradient_that_mlx_does_not():
    x = mx.array([0.2, 1.7, -2.4])
    np.testing.assert_array_equal(np.array(round_through(x)), [0, 2, -2])
    np.testing.assert_array_equal(
        np.array(mx.grad(lambda v: (round_through(v) * mx.array([1.0, 2.0, 3.0])).sum())(x)), [1, 2, 3]
    )
    assert (np.array(mx.grad(lambda v: mx.round(v).sum())(x)) == 0).all()


def test_the_gradient_reaches_every_layer_of_both_streams(block):
    work, start, _ = block
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    with work.installed():
        slopes = mx.grad(lambda w: work.loss(w, *work.minibatch(0)))(weights)
    expected = {
        f"{BLOCK}.{stream}_transformer_block.{layer}"
        for stream in ("image", "text")
        for layer in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(slopes) == expected
    for path, slope in slopes.items():
        assert slope.dtype == mx.float32
        assert float(mx.abs(slope).mean()) > 1e-6, path


def test_without_the_straight_through_estimator_query_and_fc1_learn_nothing(block, monkeypatch):
    """What the public predecessor did; this is the difference that the estimator makes."""
    work, start, _ = block
    monkeypatch.setattr("mlxquant.grids.reading.round_through", mx.round)
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    with work.installed():
        slopes = mx.grad(lambda w: work.loss(w, *work.minibatch(0)))(weights)
    for stream in ("image", "text"):
        for layer in ("attn.v_proj", "mlp.fc1"):
            assert float(mx.abs(slopes[f"{BLOCK}.{stream}_transformer_block.{layer}"]).max()) == 0
        assert float(mx.abs(slopes[f"{BLOCK}.{stream}_transformer_block.mlp.fc2"]).max()) > 0


@pytest.fixture
def transformed():
    """A layer that divides, rotates and has a branch, its soft twin, inputs [2,5,64] and their noise level."""
    rng = np.random.default_rng(0)
    weight, divisor = rng.normal(size=(6, 64)), rng.uniform(0.5, 2, 64).astype(np.float32)
    branch = LowRank(*(rng.normal(0, 0.3, shape).astype(np.float16) for shape in ((6, 3), (3, 64))))
    grid = fit_extremes(weight, WeightFormat(4))
    clock = Clock()
    layer = QuantizedLinear(
        grid.quantize(weight), grid, mx.array(rng.normal(size=6), mx.float32), mx.array(divisor), 16, branch
    )
    minibatch = Minibatch(level=mx.array([0, 0]))
    x = mx.array(rng.normal(size=(2, 5, 64)).astype(np.float32))
    return layer, lambda: SoftLayer(layer, np.float32([0.5]), minibatch, 0.0, 0), x, clock


def test_a_soft_layer_transforms_and_branches_as_the_layer_that_runs(transformed):
    layer, soften, x, clock = transformed
    np.testing.assert_allclose(np.array(soften()(x)), np.array(layer(x)), atol=1e-5)
    table = ActivationTable(np.float32([0.5]), np.float32([0.03]), np.full((1, 64), 0.1, np.float32), np.uint8([6]))
    layer.set_activations(table, clock)
    with clock.at(0.5):
        quantized = np.array(layer(x))
    np.testing.assert_allclose(np.array(soften()(x)), quantized, atol=1e-4)
    assert sorted(soften().parameters()) == ["weight"]


def test_the_gradient_passes_division_rotation_and_branch(transformed):
    layer, soften, x, _ = transformed
    slope, soft = mx.array(np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)), soften()
    found = np.array(mx.grad(lambda v: (soft(v) * slope).sum())(x))
    rows = Transform(divisor=np.array(layer.act_divisor), block=16).inputs(np.eye(64))  # row i: what channel i becomes
    wanted = np.array(slope).astype(np.float64) @ (np.array(layer.dequantized()) + layer.branch.weight) @ rows.T
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_minibatch_mixes_timesteps_and_every_sample_keeps_its_own(block):
    """The loss of a mixed minibatch is the mean of its samples' losses, each with its own conditioning, scales and
    targets.
    """
    work, start, _ = block
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    inputs, wanted, picked, key = work.minibatch(0)
    assert len(set(np.array(work._level[picked]).tolist())) > 1
    with work.installed():
        together = work.loss(weights, inputs, wanted, picked, key).item()
        alone = [
            work.loss(
                weights, *({k: v[i : i + 1] for k, v in d.items()} for d in (inputs, wanted)), picked[i : i + 1], key
            ).item()
            for i in range(len(picked))
        ]
    assert len(set(np.round(alone, 6))) > 1
    assert together == pytest.approx(np.mean(alone), rel=1e-4)


def test_the_soft_stage_with_hard_weights_is_the_quantized_stage(block):
    """What is optimised is what runs: the loss of the start's codes over all samples is the start's error, 1."""
    work, start, _ = block
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    rows = work._level.size
    with work.installed():
        loss = work.loss(weights, *work.samples(range(rows)), mx.arange(rows), mx.random.key(0)).item()
    assert rows == 12
    assert loss == pytest.approx(1, rel=2e-3)


def test_both_streams_count(block):
    work, start, _ = block
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    inputs, wanted, picked, key = work.minibatch(0)
    assert set(wanted) == {"image", "text"}
    with work.installed():
        losses = [work.loss(weights, inputs, {**wanted, k: wanted[k] + 1}, picked, key).item() for k in wanted]
        assert min(losses) > work.loss(weights, inputs, wanted, picked, key).item() + 0.1


def test_learning_counts_tensors_as_the_adapter_says(block, monkeypatch):
    work, start, adapter = block
    weights = {path: start.layers[path].dequantized() for path in work.grids}
    inputs, wanted, picked, key = work.minibatch(0)

    def rises():
        """What the loss gains when one target moves."""
        work.normalise(start.errors)
        loss = lambda goals: work.loss(weights, inputs, goals, picked, key).item()  # noqa: E731
        return {name: loss({**wanted, name: wanted[name] + 1}) - loss(wanted) for name in wanted}

    with work.installed():
        alike = rises()
        monkeypatch.setattr(type(adapter), "counts", lambda self, stage, key: {"image": 3.0}.get(key, 1.0))
        told = rises()
    assert told == pytest.approx({"image": 1.5 * alike["image"], "text": 0.5 * alike["text"]}, rel=1e-4)


def test_a_minibatch_holds_the_rows_of_its_samples(block):
    """Of whatever batches they are in: each row's input beside its target and its noise level."""
    work, _, _ = block
    inputs, wanted, picked, _ = work.minibatch(3)
    assert picked.size == work.batch == 4
    for place, row in enumerate(np.array(picked).tolist()):
        batch, within = divmod(row, 4)
        for found, states in ((inputs, work._inputs), (wanted, work._wanted)):
            assert set(found) == set(states[batch])
            for key, value in states[batch].items():
                assert found[key].dtype == mx.float32
                assert mx.array_equal(found[key][place], value[within])
        assert int(work._level[row]) == 2 - batch


@pytest.mark.parametrize(("allowed", "used"), [(2, 2), (16, 4)])
def test_a_minibatch_has_no_more_rows_than_the_model_allows(tiny, monkeypatch, allowed, used):
    seen, loss = set(), Reconstruction.loss
    monkeypatch.setattr(type(tiny.adapter), "rows", allowed)
    monkeypatch.setattr(
        Reconstruction,
        "loss",
        lambda self, weights, inputs, *rest: (seen.add(len(inputs["image"])), loss(self, weights, inputs, *rest))[1],
    )
    stages = mq.quantize(tiny, calibrate(tiny), recipe(learning=Settings(iterations=2, batch=4))).facts["stages"]
    assert seen == {used}
    assert [stage["learning"]["batch"] for stage in stages[1:-1]] == [used, used]


def test_minibatches_are_a_function_of_the_iteration(block):
    work, _, _ = block
    for one, other in zip(work.minibatch(7)[2:], work.minibatch(7)[2:], strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    assert np.array(work.minibatch(7)[2]).tolist() != np.array(work.minibatch(8)[2]).tolist()


def test_qdrop_leaves_some_activations_unquantized(block):
    work, _, _ = block
    inputs, _, picked, key = work.minibatch(0)
    path = f"{BLOCK}.image_transformer_block.mlp.fc1"
    layer = work._soft[path]
    work._minibatch.level, work._minibatch.key = work._level[picked], key
    x = inputs["image"]
    quantized = np.array(layer._quantized(x))
    layer._drop = 0.5
    mixed = np.array(layer._quantized(x))
    layer._drop = 1.0
    np.testing.assert_array_equal(np.array(layer._quantized(x)), np.array(x))
    exact, rounded = mixed == np.array(x), mixed == quantized
    assert (exact | rounded).all()
    assert 0.4 < exact.mean() < 0.6


def test_the_stage_gets_its_layers_back_also_after_an_exception(block):
    work, _, adapter = block
    with pytest.raises(KeyboardInterrupt), work.installed():
        raise KeyboardInterrupt
    for path in work.grids:
        assert type(get_module(adapter.module, path)) is nn.Linear


def test_learning_lowers_the_error_of_the_hard_rounded_block(tiny):
    calib = calibrate(tiny)
    for name, shift in (("taqdit-w3a8", {"without shift"}), ("adaround-w3a8", set())):
        stages = mq.quantize(tiny, calib, recipe(name, Settings(iterations=120, batch=4))).facts["stages"]
        for stage in stages[1:-1]:
            errors = stage["errors"]
            assert set(errors) == {"learned", "calibrated", "rtn"} | shift
            assert stage["error"] == min(errors.values())
            assert 0 < stage["learning"]["flipped"] < 0.7
        assert sum(s["errors"]["learned"] < 0.9 * s["errors"]["calibrated"] for s in stages[1:-1]) >= 1


def test_one_bad_method_does_not_get_through_the_gate(tiny, monkeypatch):
    calib = calibrate(tiny)
    plain = mq.quantize(tiny, calib, recipe(reconstruct=None))

    def broken(method, work, start, nearest, *rest):
        return {path: np.zeros_like(rounded.codes) for path, rounded in work._goals.items()}, {}

    monkeypatch.setattr(sweeping, "reconstruct_stage", broken)
    quantized = mq.quantize(tiny, calib, recipe())
    assert "learned" not in {stage["kept"] for stage in quantized.facts["stages"]}
    for path, layer in plain.layers.items():
        np.testing.assert_array_equal(layer.codes(), quantized.layers[path].codes())


def test_a_start_from_the_corrected_target_uses_both_streams(tiny):
    calib = calibrate(tiny)
    corrected = mq.quantize(tiny, calib, recipe(corrected=True, reconstruct=None))
    plain = mq.quantize(tiny, calib, recipe(reconstruct=None))
    second = "multimodal_transformer_blocks.1.image_transformer_block.attn.q_proj"
    assert (corrected.layers[second].codes() != plain.layers[second].codes()).any()


def test_stages_with_two_starts_are_refused(tiny):
    made = recipe()
    odd = replace(made.rules[-1][1], rounding="rtn")
    with pytest.raises(RecipeError, match="one method from one start"):
        mq.quantize(tiny, calibrate(tiny), replace(made, rules=(("*.fc2", odd), *made.rules)))


@pytest.mark.parametrize("after", [1, 2])
def test_a_kill_inside_a_block_resumes_to_the_same_bytes(tiny, tmp_path, monkeypatch, after):
    calib, job = calibrate(tiny), recipe()
    whole = mq.quantize(tiny, calib, job)
    monkeypatch.setattr(store, "INTERVAL", 0.0)
    saves = []
    save = store.StageCheckpoint.save

    def stop(self, arrays, facts):
        save(self, arrays, facts)
        saves.append(facts["iteration"])
        if len(saves) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.StageCheckpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        mq.quantize(tiny, calib, job, work=tmp_path)
    assert list(tmp_path.glob("*.checkpoint.safetensors"))
    monkeypatch.setattr(store.StageCheckpoint, "save", save)
    resumed = mq.quantize(tiny, calib, job, work=tmp_path)
    assert not list(tmp_path.glob("*.checkpoint.safetensors"))
    assert [stage["learning"] for stage in resumed.facts["stages"][1:-1]] == [
        stage["learning"] for stage in whole.facts["stages"][1:-1]
    ]
    for path, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.codes(), resumed.layers[path].codes())


def test_a_damaged_checkpoint_is_refused_and_a_foreign_one_ignored(tmp_path):
    mine, other = (store.StageCheckpoint(tmp_path / "b.safetensors", job) for job in ("mine", "other"))
    assert mine.load() is None
    mine.save({"alpha/w": mx.array([1.5, -2.0])}, {"iteration": 25})
    arrays, facts = mine.load()
    assert facts == {"iteration": 25}
    np.testing.assert_array_equal(np.array(arrays["alpha/w"]), [1.5, -2.0])
    assert other.load() is None
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"b\.safetensors"):
        mine.load()
    mine.clear()
    assert mine.load() is None
