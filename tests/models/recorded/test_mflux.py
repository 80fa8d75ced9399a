"""Transformers of mflux, recorded as its pipelines call them, and quantized: nobody has written a host for them."""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.layers.linear import find_quantized
from mlxquant.models.recorded.adapter import RecordedAdapter

from support.mflux_models import HOSTS, mflux

pytestmark = [pytest.mark.mflux, pytest.mark.slow]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """mflux computes in bfloat16 where nobody says otherwise."""
    monkeypatch.setattr(mflux("models.common.config.model_config.ModelConfig"), "precision", mx.float32)


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


def recorded(host, module=None):
    module = host.module() if module is None else module
    with mq.recording(module) as seen:
        host.run(module)
    return module, seen


def quantized(host, recipe, **options):
    """The module, the report, and the relative error over the recorded calls of what it returns."""
    module, seen = recorded(host)
    exact = [seen[index].result for index in range(len(seen))]
    report = mq.quantize_module(module, seen, recipe, **options)
    return module, report, error(host.run(module), exact)


def error(wrote, wanted):
    noise = sum(float(mx.square(a - b).sum()) for a, b in zip(wrote, wanted, strict=True))
    return noise / sum(float(mx.square(b).sum()) for b in wanted)


def narrow(module):
    """The layers of 4 bits: recipes keep the inputs of the others, embedders and the like."""
    return [layer for layer in find_quantized(module).values() if layer.facts["format"]["bits"] == 4]


def test_its_blocks_are_found_and_make_again_what_was_recorded(host):
    module, seen = recorded(host)
    adapter = RecordedAdapter(seen)  # which has compared four calls already
    assert not adapter.broken
    assert tuple(stage.name for stage in adapter.blocks) == host.blocks
    for index, result in enumerate(host.run(module)):
        state = adapter.run(adapter.state(index), adapter.sigmas[index])
        np.testing.assert_allclose(np.array(state["result"]), np.array(result), rtol=0, atol=1e-5)


def test_calibrated_codes_beat_rounding_and_every_layer_is_quantized(host):
    module, report, calibrated = quantized(host, f"gptq-w4a16{host.widths}")
    _, _, rounded = quantized(host, f"rtn-w4a16{host.widths}")
    assert report.blocks == host.blocks
    assert not report.whole
    assert calibrated <= rounded
    assert rounded < 0.1
    kept = {layer.path: layer.reason for layer in report.sizes.kept}
    assert all(any(part in path for part in host.idle) for path in kept if path), kept  # "" has no layers of its own
    assert not any(any(part in path for part in host.idle) for path in find_quantized(module))


@pytest.mark.parametrize(("recipe", "entries"), [("rtn-w4a8-static", 1), ("rtn-w4a8-token", 0)])
def test_inputs_are_quantized_too(host, recipe, entries):
    module, report, off = quantized(host, recipe)
    assert report.blocks == host.blocks
    for layer in narrow(module):
        assert layer.facts["token"] == (entries == 0)
        assert (len(layer.table.sigma) if layer.table else 0) == entries
    assert off < 0.2


def test_inputs_have_an_entry_for_each_noise_level():
    host = HOSTS["FLUX.2"]
    module, report, off = quantized(host, "rtn-w4a8", time=lambda timestep, **others: timestep)
    assert report.blocks == host.blocks
    for layer in narrow(module):
        np.testing.assert_allclose(layer.table.sigma, sorted({float(call["timestep"]) for call in host.calls()}))
    assert off < 0.2


def test_saved_and_loaded_it_returns_the_same(host, tmp_path):
    module, _, _ = quantized(host, f"gptq-w4a16{host.widths}")
    file = mq.save_module(module, tmp_path / "module.safetensors")
    mx.random.seed(1)
    fresh = mq.load_module(host.build(), file)
    for wrote, wanted in zip(host.run(fresh), host.run(module), strict=True):
        assert mx.array_equal(wrote, wanted)


def test_calls_in_bfloat16_are_made_again(host, monkeypatch):
    monkeypatch.setattr(mflux("models.common.config.model_config.ModelConfig"), "precision", mx.bfloat16)
    module = host.module()
    module.set_dtype(mx.bfloat16)
    _, seen = recorded(host, module)
    adapter = RecordedAdapter(seen)
    assert not adapter.broken
    assert tuple(stage.name for stage in adapter.blocks) == host.blocks


def flux2_steps(predict, calls):
    for prompt, empty in zip(calls[::2], calls[1::2], strict=True):
        predict(
            prompt["hidden_states"], prompt["img_ids"], prompt["encoder_hidden_states"], prompt["txt_ids"],
            empty["encoder_hidden_states"], empty["txt_ids"], 3.5, prompt["timestep"],
        )  # fmt: skip


def z_image_steps(predict, calls):
    for prompt, empty in zip(calls[::2], calls[1::2], strict=True):
        predict(
            prompt["x"], mx.array(prompt["timestep"]), prompt["sigmas"], prompt["cap_feats"], empty["cap_feats"], 4.0
        )


@pytest.mark.parametrize(
    ("name", "pipeline", "steps"),
    [
        ("FLUX.2", "models.flux2.variants.txt2img.flux2_klein.Flux2Klein", flux2_steps),
        ("Z-Image", "models.z_image.variants.z_image.ZImage", z_image_steps),
    ],
)
def test_calls_from_a_compiled_prediction_are_seen(name, pipeline, steps, monkeypatch):
    host = HOSTS[name]
    monkeypatch.setattr(mflux("utils.apple_silicon.AppleSiliconUtil"), "is_m1_or_m2", staticmethod(lambda: False))
    module, calls = host.module(), host.calls()
    predict = mflux(pipeline)._predict(module)
    steps(predict, calls)  # traced before anybody records
    with mq.recording(module) as seen:
        steps(predict, calls)
    assert len(seen) == len(calls)
    report = mq.quantize_module(module, seen, f"rtn-w8a16{host.widths}")
    assert report.blocks == host.blocks
