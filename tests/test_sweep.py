"""The sweep: gates, order, resumption, and what it refuses."""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant import artifacts, store, streams, sweep
from mlxquant.errors import ArtifactError, CalibrationError, NumericsError, RecipeError
from mlxquant.layers import QuantizedLinear
from mlxquant.methods import registry
from mlxquant.recipe import parse_recipe


def calibrate(model, prompts=2, steps=2):
    return mq.calibrate(model, prompts=prompts, steps=steps)


def arrays(qmodel):
    return {name: np.array(value) for name, value in qmodel._arrays().items()}


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert set(a) == set(b)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def test_the_model_itself_is_left_alone(tiny):
    before = tiny.adapter.fingerprint
    quantized = mq.quantize(tiny, calibrate(tiny), "rtn-w4a8")
    assert tiny.adapter.fingerprint == before
    assert not [m for _, m in tiny.adapter.module.named_modules() if isinstance(m, QuantizedLinear)]
    assert set(quantized.layers) == set(tiny.adapter.linears())
    assert {stage["kept"] for stage in quantized.facts["stages"]} == {"rtn"}


def test_formats_follow_the_recipe(tiny):
    quantized = mq.quantize(tiny, calibrate(tiny), parse_recipe("rtn-w3a6-g32", ["*.mlp.fc2=w5a16", "context_embedder=keep"]))
    layers = quantized.layers
    block = "multimodal_transformer_blocks.0.image_transformer_block"
    assert "context_embedder" not in layers
    assert str(layers[f"{block}.attn.q_proj"].format) == "w3-g32"
    assert set(layers[f"{block}.attn.q_proj"].table.bits) == {6}
    assert str(layers[f"{block}.mlp.fc2"].format) == "w5"
    assert layers[f"{block}.mlp.fc2"].table is None
    for path in (f"{block}.adaLN_modulation.layers.1", "t_embedder.mlp.layers.0", "final_layer.linear"):
        assert layers[path].format.bits == 8
        assert layers[path].table is None


def test_every_timestep_has_its_own_scales_and_static_has_one(tiny):
    calib = calibrate(tiny, steps=3)
    path = "multimodal_transformer_blocks.1.image_transformer_block.mlp.fc1"
    table = mq.quantize(tiny, calib, "rtn-w8a8").layers[path].table
    np.testing.assert_allclose(table.sigma, calib.sigmas[::-1], rtol=1e-6)
    assert len(set(table.step.tolist())) == 3
    assert len(mq.quantize(tiny, calib, "rtn-w8a8-static").layers[path].table.step) == 1


def test_stages_are_never_worse_than_rounding(tiny):
    quantized = mq.quantize(tiny, calibrate(tiny), "gptq-w2a16")
    gated = [stage for stage in quantized.facts["stages"] if "rtn" in stage["errors"]]
    assert len(gated) == len(tiny.adapter.stages)
    for stage in gated:
        assert stage["error"] == min(stage["errors"].values()) == stage["errors"][stage["kept"]]
    assert sum(s["error"] < 0.9 * s["errors"]["rtn"] for s in gated) >= 2


def test_a_method_that_hurts_is_dropped_and_it_says_so(tiny, monkeypatch):
    plain = mq.quantize(tiny, calibrate(tiny), "rtn-w4a16")
    broken = registry.Method("gptq", "round", lambda w, grid, moments: np.zeros(w.shape, np.uint8), None, "broken")
    get = registry.get
    monkeypatch.setattr(sweep.registry, "get", lambda kind, name: broken if name == "gptq" else get(kind, name))
    quantized = mq.quantize(tiny, calibrate(tiny), "gptq-w4a16")
    assert {stage["kept"] for stage in quantized.facts["stages"]} == {"rtn"}
    assert_same(quantized, plain)


def test_running_twice_gives_the_same_model(tiny):
    calib = calibrate(tiny)
    assert_same(mq.quantize(tiny, calib, "gptq-w4a8"), mq.quantize(tiny, calib, "gptq-w4a8"))


@pytest.mark.parametrize("stage", range(4))
def test_interrupted_sweep_resumes_to_the_same_model(tiny, tmp_path, monkeypatch, stage):
    calib = calibrate(tiny)
    whole = mq.quantize(tiny, calib, "gptq-w4a8")
    done = []
    save = store.FolderStore.save

    def stop(self, which, result):
        if len(done) == stage:
            raise KeyboardInterrupt
        done.append(which.name)
        save(self, which, result)

    monkeypatch.setattr(store.FolderStore, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        mq.quantize(tiny, calib, "gptq-w4a8", work=tmp_path)
    monkeypatch.setattr(store.FolderStore, "save", save)
    rebuilt = []
    original = sweep.Sweep.quantize
    monkeypatch.setattr(sweep.Sweep, "quantize", lambda self, s, *rest: rebuilt.append(s.name) or original(self, s, *rest))
    assert_same(mq.quantize(tiny, calib, "gptq-w4a8", work=tmp_path), whole)
    assert rebuilt == [s.name for s in tiny.adapter.stages][stage:]


def test_progress_of_another_job_is_not_used(tiny, tmp_path):
    calib = calibrate(tiny)
    mq.quantize(tiny, calib, "rtn-w2a16", work=tmp_path)
    assert_same(mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path), mq.quantize(tiny, calib, "rtn-w4a16"))


def test_damaged_progress_is_refused(tiny, tmp_path):
    calib = calibrate(tiny)
    mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path)
    path = tmp_path / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"head\.safetensors"):
        mq.quantize(tiny, calib, "rtn-w4a16", work=tmp_path)


def test_nan_weights_are_named(tiny):
    calib = calibrate(tiny)
    linear = tiny.adapter.linears()["final_layer.linear"]
    linear.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"final_layer\.linear\.weight holds 1 NaN"):
        mq.quantize(tiny, calib, "rtn-w4a16")
    with pytest.raises(NumericsError, match=r"final_layer\.linear\.weight holds 1 NaN"):
        mq.calibrate(tiny, prompts=1, steps=1)


def test_foreign_or_empty_calibration_is_refused(tiny):
    calib = calibrate(tiny)
    tiny.adapter.module.final_layer.linear.bias[0] = 7.0
    with pytest.raises(CalibrationError, match="of other weights"):
        mq.quantize(tiny, calib, "rtn-w4a16")
    with pytest.raises(CalibrationError, match="at least one prompt"):
        mq.calibrate(tiny, prompts=[])


def test_unconditional_calibration_sees_what_the_sampler_sees(tiny):
    calib = mq.calibrate(tiny, prompts=1, steps=1, cfg=0)
    _, states = calib.batches(tiny.adapter)
    empty = tiny.adapter.encode([""])
    assert mx.array_equal(states[0]["tokens"], empty.tokens)


def test_errors_are_measured_on_what_a_stage_writes(tiny):
    calib = calibrate(tiny)
    sigmas, states = calib.batches(tiny.adapter)
    embed, block = tiny.adapter.stages[:2]
    inputs = streams.run_stage(tiny.adapter, embed, sigmas, states)
    targets = streams.ExactStream(tiny.adapter, sigmas, inputs).targets(block)
    assert set(targets[0]) == {"image", "text"}
    assert streams.stage_error(targets, targets) == 0
    halved = [{**s, "image": s["image"] * 0.5} for s in targets]
    assert streams.stage_error(halved, targets) == pytest.approx(0.25 / 2)  # image and text count the same, the conditioning not


def test_overflowing_stage_is_named(tiny):
    calib = calibrate(tiny)
    tiny.adapter.linears()["final_layer.linear"].weight *= 1e9
    calib = calibrate(tiny)
    with pytest.raises(NumericsError, match=r"final_layer\.linear: a scale of .* does not fit in float16"):
        mq.quantize(tiny, calib, "rtn-w4a16")


def test_groups_that_do_not_fit_are_refused_at_once(tiny):
    with pytest.raises(RecipeError, match="groups of 128 do not divide an input width of 32"):
        mq.quantize(tiny, calibrate(tiny), "rtn-w4a16-g128")


def test_quantizing_twice_is_refused(tiny):
    calib = calibrate(tiny)
    with pytest.raises(RecipeError, match="quantized already"):
        mq.quantize(mq.quantize(tiny, calib, "rtn-w4a16"), calib, "rtn-w4a16")


def test_calibration_is_saved_and_loaded(tiny, tmp_path):
    calib = calibrate(tiny)
    calib.save(tmp_path / "c.safetensors")
    again = type(calib).load(tmp_path / "c.safetensors")
    assert again.facts == calib.facts
    assert mx.array_equal(again.latents, calib.latents)
    np.testing.assert_array_equal(again.sigmas, calib.sigmas)


def test_equal_facts_give_equal_digests():
    assert artifacts.digest({"a": 1, "b": [2]}) == artifacts.digest({"b": [2], "a": 1})
