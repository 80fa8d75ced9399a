"""What SpinQuant rotates, and what was trained through rounding, go through the rest of the package as any other model
does.
"""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ExportError, MlxQuantError
from mlxquant.spin_quant import SpinQuant

from support.command_line import succeed
from support.tiny_language import TEXT, gpt_folder, llama_folder


def rotated(folder):
    """The model in ``folder`` with its rotations folded in."""
    model = mq.load(folder)
    tokens = model.language.tokenizer.encode(TEXT)[:128].reshape(4, 32)
    SpinQuant(model.adapter.module, 4, 4).optimize([tokens], steps=2).rotate()
    return mq.Model(type(model.adapter)(model.adapter.module, *_rest(model.adapter)))


def _rest(adapter):
    return (adapter.tokenizer, {}) if adapter.name == "gpt" else (adapter.describe()["config"],)


@pytest.mark.parametrize(
    "kind", ["gpt", pytest.param("llama", marks=pytest.mark.mlxlm), pytest.param("tied", marks=pytest.mark.mlxlm)]
)
@pytest.mark.parametrize("recipe", ["gptq-w4a4-token", "qronos-w4a16-g32", "gptq+rotation-w4a4-token"])
def test_any_recipe_quantizes_a_rotated_model_and_it_is_saved(kind, recipe, tmp_path):
    source = (
        gpt_folder(tmp_path / "in")
        if kind == "gpt"
        else llama_folder(tmp_path / "in", tie_word_embeddings=kind == "tied")
    )
    exact, model = mq.load(source), rotated(source)
    if kind != "gpt":
        model.adapter._tokenizer = exact.language.tokenizer
    tokens = mx.array(exact.language.tokenizer.encode(TEXT)[:32][None])
    np.testing.assert_allclose(
        np.array(model.language.logits(tokens)), np.array(exact.language.logits(tokens)), rtol=1e-4, atol=1e-4
    )
    (tmp_path / "text.txt").write_text(TEXT)
    calib = mq.calibrate_text(model, tmp_path / "text.txt", samples=4, length=32)
    done = mq.quantize(model, calib, recipe)
    done.save(tmp_path / "out")
    np.testing.assert_array_equal(mq.load(tmp_path / "out").predict(TEXT, 32, 4).nats, done.predict(TEXT, 32, 4).nats)


def test_a_turned_norm_has_no_place_in_stock_mlx_lm(tmp_path):
    model = rotated(gpt_folder(tmp_path / "in"))
    (tmp_path / "text.txt").write_text(TEXT)
    done = mq.quantize(model, mq.calibrate_text(model, tmp_path / "text.txt", samples=2), "rtn-w4a16-g32")
    with pytest.raises(ExportError, match=r"ln_f.*TurnedNorm"):
        mq.export(done, tmp_path / "out", "mlx-lm")
    assert not (tmp_path / "out").exists()


def test_a_gpt_trained_through_rounding_is_measured_as_it_was_trained(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shape = (
        "--n_layer",
        1,
        "--n_head",
        2,
        "--n_embd",
        32,
        "--block_size",
        32,
        "--batch_size",
        2,
        "--max_iters",
        2,
        "--eval_interval",
        0,
    )
    rounding = ("--linear_variant_attn", "quantized_linear", "--linear_variant_mlp", "quantized_linear",
    "--quantize_linear_method",
                "ternary_quant", "--quantization_warmup_iters", 0)  # fmt: skip
    trained, _ = succeed("train-gpt", "--out_dir", tmp_path / "out", "--data", tmp_path / "text.txt", *shape, *rounding)
    measured, _ = succeed("perplexity", "--model", tmp_path / "out", "--data", tmp_path / "text.txt")
    facts = measured["models"][str(tmp_path / "out")]
    assert facts["bits_per_character"] == pytest.approx(trained["bits_per_character"], rel=1e-5)
    model = mq.load(tmp_path / "out")
    weights = {float(abs(w)) for w in np.unique(np.array(model.adapter.module.model.h[0].mlp.c_fc.dequantized()))}
    assert len(weights) == 2
    with pytest.raises(MlxQuantError, match="quantized already"):
        mq.quantize(model, mq.calibrate_text(model, tmp_path / "text.txt", samples=2), "rtn-w4a16")
