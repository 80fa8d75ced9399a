"""What a dry run says of small pipelines of mflux, against what quantizing then writes."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.api.dry_run import plan_pipeline
from mlxquant.api.pipeline_plan import ComponentPlan, PipelinePlan
from mlxquant.api.pipelines import quantize_pipeline
from mlxquant.errors import AdapterError, CalibrationError
from mlxquant.layers.sizes import stored_bytes
from mlxquant.models.mflux.outline import called_modules, unread
from mlxquant.models.mflux.pipeline import MfluxPipeline
from mlxquant.sweep.estimate import Work

from support.command_line import fail, succeed
from support.mflux_checkpoints import FAMILIES, small_models
from support.mflux_quantized import CALIBRATION, SIZE, dense, drawn, quantized

HOW = {"steps": 2, "size": SIZE}
SHOWN_BY_A_RUN = ("flux3-image-klein", "krea-2", "moss-image-sft", "fibo", "iris-3b")
"""Where a layer is for something else than where it is called tells: FLUX.3 has modulation of images that a prompt
alone reaches to no effect, and others put what is embedded together with more before the first block reads it.
"""
mflux = pytest.mark.mflux
slow = pytest.mark.slow


def loaded(folder):
    with unread():
        return MfluxPipeline.load(str(folder))


@mflux
@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_are_those_that_are_written_and_no_weight_is_read(name):
    done = quantized(name)
    with small_models():
        pipeline = loaded(done.dense)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()  # of the other pipeline
        plan = plan_pipeline(pipeline, len(CALIBRATION), "gptq-w4a16-g64", **HOW, measure=False)
    picture = 24 * 4 * 3 * SIZE[0] * SIZE[1]  # where no decoder ends it, some are alive at once in float32
    assert mx.get_peak_memory() - before < 0.06 * plan.loaded + picture * (name == "iris-3b")
    assert [one.name for one in plan.components] == [one.name for one in done.report.components]
    for ours, theirs in zip(plan.components, done.report.components, strict=True):
        assert (ours.before, ours.weights, ours.recipe) == (theirs.before, theirs.weights, theirs.recipe)
        assert ours.after == pytest.approx(theirs.after, rel=0.08 if name in SHOWN_BY_A_RUN else 0)
    theirs = {one.name: one.report.calls for one in done.report.components if one.name.endswith("transformer")}
    assert {one.name: one.calls for one in plan.components if one.name.endswith("transformer")} == theirs


@mflux
@slow
def test_calibrated_texts_and_overrides_are_planned_as_they_are_quantized():
    folder = dense("qwen-image")
    with small_models():
        pipeline = loaded(folder)
        how = {"recipe": "rtn-w8a16-g64", "text_recipe": "gptq-w4a16-g64"}
        plan = plan_pipeline(pipeline, 1, **how, **HOW, measure=False)
        report = quantize_pipeline(pipeline, CALIBRATION[:1], **how, **HOW)
    sizes = [(one.after, two.after) for one, two in zip(plan.components, report.components, strict=True)]
    np.testing.assert_allclose(*zip(*sizes, strict=True), rtol=0.01)
    assert plan.components[-1].calls == 2  # the prompt, and what guidance leads away from


@mflux
@slow
def test_what_is_called_part_by_part_is_rounded_to_nearest():
    done = quantized("ming-image-design", "rtn-w8a16-g64", text_recipe="gptq-w4a16-g64")
    with small_models():
        plan = plan_pipeline(loaded(done.dense), 2, "rtn-w8a16-g64", "gptq-w4a16-g64", **HOW, measure=False)
    rows = {one.name: one for one in done.report.components}
    assert {layer.format for layer in rows["heads"].report.layers} == {"w4-g64-bf16"}
    assert [rows[name].report.calls for name in ("text_encoder", "connector")] == [2, 2]
    assert {one.name: one.after for one in plan.components}["heads"] == rows["heads"].after
    with small_models():
        theirs = MfluxPipeline.load(str(done.out), quantized=True)
    np.testing.assert_allclose(drawn(theirs), done.after, atol=1.1 / 255)


@mflux
@slow
def test_calls_are_counted_and_of_one_shape_outlined_once():
    with small_models():
        pipeline = loaded(dense("qwen-image"))
        found = called_modules(pipeline, 3, size=SIZE)
    assert {name: one.calls for name, one in found.items()} == {"text_encoder": 2, "transformer": 6}
    assert sum(stored_bytes(one.outline.module) for one in found.values()) > 0
    assert found["transformer"].outline.roles["img_in"] == "embedder"


@mflux
@slow
def test_a_pipeline_draws_the_same_after_a_dry_run():
    folder = dense("schnell")
    with small_models():
        wanted = MfluxPipeline.load(str(folder)).draw(CALIBRATION[:1], 2, size=SIZE)
        pipeline = loaded(folder)
        plan_pipeline(pipeline, 1, "gptq-w4a16-g64", **HOW, measure=False)
        np.testing.assert_array_equal(pipeline.draw(CALIBRATION[:1], 2, size=SIZE), wanted)


@mflux
@slow
def test_a_module_that_is_not_called_wants_a_recipe_without_calibration(monkeypatch):
    with small_models():
        pipeline = loaded(dense("schnell"))
        monkeypatch.setattr("mlxquant.api.dry_run.called_modules", lambda *args: {})
        with pytest.raises(CalibrationError, match=r"transformer is not called while the pipeline draws.*such as rtn"):
            plan_pipeline(pipeline, 1, "gptq-w4a16-g64", **HOW, measure=False)


@mflux
@slow
def test_the_command(monkeypatch, tmp_path):
    folder, door = dense("z-image-turbo"), import_module("mlxquant.quantize")  # the package's name is a function
    command = ("quantize", "--model", str(folder), "--recipe", "gptq-w4a16-g64", "--num-prompts", 2, "--steps", 2)
    command += ("--size", 64)
    with small_models():
        facts, said = succeed(*command, "--dry-run")
        assert [one["name"] for one in facts["components"]] == ["vae", "transformer", "text_encoder"]
        assert facts["seconds"] > 0
        assert facts["operations_per_second"]["matrices"] > 0
        assert "which suffices" in said
        assert "component" in said
        assert "not computed" in said
        monkeypatch.setattr(door, "memory_bytes", lambda: 1_000_000)
        said = succeed(*command, "--dry-run")[1]
        assert "its weights take 0.017 GB in memory, and this machine has 0.001 GB" in said
        out = tmp_path / "out"
        said = fail(*command, "--out", out, code=1)
        assert "quantize it on a larger one" in said
        assert not out.exists()
        monkeypatch.setattr(door, "memory_bytes", lambda: 20_000_000)
        said = succeed(*command, "--out", out)[1]
        assert "warning: " in said
        assert "it will swap" in said
        assert "no such folder" in fail(
            "quantize", "--model", f"mflux:z-image-turbo@{tmp_path}/none", "--recipe", "gptq-w4a16-g64", "--dry-run"
        )


def test_models_of_ours_tell_their_sizes():
    facts, said = succeed("quantize", "--model", "mmdit-shapes", "--recipe", "gptq-w4a16-g32", "--dry-run")
    assert facts["after"] < facts["before"] / 2
    assert "by arithmetic" in said
    assert "Missing option '--out'" in fail("quantize", "--model", "mmdit-shapes", "--recipe", "gptq-w4a8")


PLAN = PipelinePlan(
    (
        ComponentPlan("vae", "", 10**8, 2 * 10**8, 2 * 10**8, 4 * 10**8),
        ComponentPlan(
            "transformer", "gptq", 10**9, 2 * 10**9, 10**9, 4 * 10**9, 10**12, 8, 10**8,
            Work(3 * 10**9, 10**9, 10**9, 6 * 10**12, 2 * 10**12, "learning"),
        ),
    ),
    "mflux:some", "2 prompts", 10**8, (10**12, 10**11),
)  # fmt: skip


def test_sums():
    assert (PLAN.loaded, PLAN.peaks, PLAN.peak) == (4.4e9, [4.6e9, 9.4e9], 9.4e9)  # the decoder takes 16 bits by then
    assert (PLAN.seconds(PLAN.components[1]), PLAN.drawing_seconds) == (26, 1)
    assert PLAN.facts["seconds"] == 27
    rows = str(PLAN).splitlines()
    assert [row.split()[-1] for row in rows[:4]] == ["time", "0.200", "s", "s"]
    assert rows[4].split() == ["all", "1100.0", "M", "2.200", "1.200", "9.400", "27", "s"]
    assert "of transformer hidden states 3.000, moments 1.000, rounding 1.000" in str(PLAN)
    assert "not counted, so it will take longer: learning" in str(PLAN)
    assert "NumPy" not in str(PipelinePlan(PLAN.components, "mflux:some", "", 0))


def test_what_is_said_of_memory():
    assert PLAN.require_memory(10**10) == ""
    assert "which suffices" in PLAN.told_of_memory(10**10)
    advice = PLAN.require_memory(5 * 10**9)
    assert "transformer will take some 9.400 GB of memory, by arithmetic, and this machine has 5.000 GB" in advice
    assert "fewer --samples" in advice
    with pytest.raises(AdapterError, match=r"its weights take 4.400 GB in memory, and this machine has 4.000 GB"):
        PLAN.require_memory(4 * 10**9)
    assert "its weights take" in PLAN.told_of_memory(4 * 10**9)
