"""SpinQuant on models as people have them: what ``load`` returns, and GPTs that learn, or learned, through rounding."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import AdapterError, RecipeError
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import get_module, parameters
from mlxquant.models.gpt.files import save_gpt
from mlxquant.models.gpt.tokenizers import CharTokenizer
from mlxquant.qat.convert import kept_activations, quantizing_points
from mlxquant.qat.folders import QUANTIZATION, quantized_gpt
from mlxquant.qat.integer import RowParts, to_integer_layers
from mlxquant.qat.options import QuantizationOptions
from mlxquant.qat.training import build_optimizer, training_step
from mlxquant.spin_quant import SpinQuant
from mlxquant.spin_quant.files import load_spun, save_spun
from mlxquant.spin_quant.plain_layers import plain

from support.language_models import tiny_mlx_lm
from support.small_gpt import prepared, random_gpt, tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = {
    "linear_variant_attn": "quantized_linear",
    "linear_variant_mlp": "quantized_linear",
    "quantization_warmup_iters": 0,
}
TRAINED = {  # ways in which a GPT may have been trained
    "ternary": WEIGHTS | {"quantize_linear_method": "ternary_quant"},
    "affine-4": WEIGHTS | {"quantize_linear_method": "affine_quant", "quantize_linear_bits": 4},
    "values only": {"linear_variant_v": "quantized_linear", "quantization_warmup_iters": 0},
    "embeddings": WEIGHTS | {"quantize_wte": True, "quantize_wpe": True},
}
POINTS = WEIGHTS | {"quantize_attn_act": True, "quantize_mlp_act": True, "store_activations": True}


def logits(model):
    return np.array(model(tokens(seed=9)))


def text(count=4):
    return [np.array(tokens(4, 16, seed)) for seed in range(count)]


@pytest.mark.parametrize("integers", [False, True], ids=["trained through", "integers"])
@pytest.mark.parametrize("given", TRAINED)
def test_what_was_learned_through_rounding_is_turned_and_not_changed(given, integers):
    """The function is that of the rounded weights, which is what was trained, whether they are floats or codes."""
    model, _ = prepared(TRAINED[given])
    model.eval()
    expected = logits(model)
    if integers:
        to_integer_layers(model)
    SpinQuant(model).rotate()
    np.testing.assert_allclose(logits(model), expected, atol=1e-3 * np.abs(expected).max())


def test_the_layer_behind_row_parts_is_one_with_all_of_their_rows():
    model = to_integer_layers(prepared(TRAINED["values only"])[0])
    parts, x = model.model.h[0].attn.c_attn, mx.random.normal((3, 32), key=mx.random.key(0))
    assert isinstance(parts, RowParts)
    np.testing.assert_allclose(np.array(plain(parts)(x)), np.array(parts(x)), atol=1e-5)


def test_a_layer_that_changes_its_input_has_no_plain_one():
    rotated = SpinQuant(random_gpt(), activation_bits=8).optimize(text(), steps=1).apply()._model
    layer = get_module(rotated, "model.h.0.mlp.c_proj")
    assert isinstance(layer, QuantizedLinear)
    assert plain(layer) is None


def test_optimising_now_and_then_changes_nothing_of_the_training():
    """Stored activations, the optimizer and every weight are what they are without."""
    found = []
    for with_spin in (False, True):
        model, ramp = prepared(POINTS | {"quantize_linear_method": "stochastic_quant"})
        model.train()
        optimizer = build_optimizer(6, 1e-3)
        optimizer.init(model.trainable_parameters())
        update = training_step(model, optimizer)
        spin = SpinQuant(model, bits=4)
        for step in range(6):
            ramp.iteration = step
            if with_spin and step % 2:
                spin.optimize(text(2), steps=2)
            update(tokens(seed=step), tokens(seed=step + 50))
        assert model.training
        found.append({**parameters(model), **kept_activations(model)})
    assert len(spin.history) == 6
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_array_equal(np.array(found[1][name]), np.array(value), err_msg=name)


def test_applying_after_such_a_training_bakes_the_rotation_in():
    model, ramp = prepared(POINTS)
    optimizer = build_optimizer(4, 1e-3)
    optimizer.init(model.trainable_parameters())
    update, spin = training_step(model, optimizer), SpinQuant(model, bits=8)
    for step in range(4):
        ramp.iteration = step
        update(tokens(seed=step), tokens(seed=step + 50))
        spin.optimize(text(2), steps=1)
    ramp.iteration = None
    model.eval()
    expected = logits(model)
    spin.apply()
    assert {type(get_module(model, path)) for path in spin.stream.linears} == {QuantizedLinear}
    assert len(quantizing_points(model)) == 2 * 12  # activations stay rounded where they were
    assert np.abs(logits(model) - expected).mean() < 0.1 * np.abs(expected).mean()


@pytest.fixture
def trained(tmp_path):
    """A folder as train-gpt leaves it, trained through rounding of weights and activations."""
    alphabet = "".join(chr(33 + n) for n in range(60)) + "\n"
    facts = {QUANTIZATION: QuantizationOptions(POINTS).to_dict()}
    save_gpt(tmp_path / "gpt", random_gpt(), CharTokenizer(alphabet), facts)
    (tmp_path / "text.txt").write_text(alphabet * 40)
    return tmp_path / "gpt"


def test_what_load_returns_can_be_given(trained):
    for model in (mq.load(trained), mq.load("gpt-python")):
        spin = SpinQuant(model, bits=8)
        before = model.predict("!#$%&" * 60, limit=1).bits_per_character
        spin.optimize([np.arange(32).reshape(2, 16)], steps=1).apply()
        assert model.predict("!#$%&" * 60, limit=1).bits_per_character == pytest.approx(before, rel=0.02)
        assert isinstance(get_module(model.module, "model.h.0.mlp.c_fc"), QuantizedLinear)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_of_mlx_lm_can_be_given(kind):
    pytest.importorskip("mlx_lm")
    model = tiny_mlx_lm(kind, **({} if kind == "gpt2" else {"tie_word_embeddings": False}))
    assert type(model).__name__ == "Model"
    SpinQuant(model).optimize([np.arange(32).reshape(2, 16)], steps=1).apply()
    with pytest.raises(AdapterError, match=r"rotated already|QuantizedLinear"):
        SpinQuant(model)


@pytest.mark.parametrize("wrong", [None, "gpt2", (random_gpt, "tokenizer"), np.zeros(3)])
def test_what_is_no_model_is_refused_by_its_kind(wrong):
    with pytest.raises(AdapterError, match=rf"found (numpy's )?{type(wrong).__name__}; pass the module"):
        SpinQuant(wrong)


def test_a_model_that_draws_is_refused():
    with pytest.raises(AdapterError, match="residual stream of"):
        SpinQuant(mq.load("mmdit-shapes"))


def test_rounded_activations_survive_the_file(trained, tmp_path):
    model, tokenizer, facts = quantized_gpt(trained)
    SpinQuant(model, kv_bits=8).optimize(text(), steps=1).apply()
    with pytest.raises(RecipeError, match="24 points, and facts\\['quantization'\\] tells of 0"):
        save_spun(tmp_path / "spun", model, tokenizer, {})
    save_spun(tmp_path / "spun", model, tokenizer, facts)
    np.testing.assert_array_equal(logits(load_spun(tmp_path / "spun")[0]), logits(model))
    assert mq.load(tmp_path / "spun").predict("!#$%&" * 40, limit=1).perplexity > 1


def test_the_example_takes_a_checkpoint_with_quantized_layers(trained, tmp_path):
    def run(name, *words):
        done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "spinquant_out"
    quick = ("--steps", 1, "--batches", 1, "--batch-size", 2, "--length", 16)
    run("spinquant_ptq.py", "--ckpt", trained, "--data", tmp_path / "text.txt", "--out_dir", out, *quick)
    assert run("spinquant_sample.py", "--ckpt", out, "--prompt", "#", "--max_new_tokens", 4).startswith("#")
