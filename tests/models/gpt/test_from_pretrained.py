"""``GPT.from_pretrained``: GPT-2 as the hub has it, through mlx-lm, and GPTs of our own."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant import GPT
from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import parameters

from support.hub_gpt2 import CONFIG, gpt2_checkpoint, gpt2_weights, hub_cache
from support.language_models import CONFIG as OURS
from support.language_models import tiny_gpt
from support.tiny_language import gpt_folder, llama_folder

mlxlm = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 12))
README = """
from mlxquant import GPT
from mlxquant.spin_quant import SpinQuant
import mlx.core as mx

model = GPT.from_pretrained('gpt2')  # load your model
sq = SpinQuant(model, bits=4)
calib_data = [mx.random.randint(0, model.config.vocab_size, (1, 16)) for _ in range(8)]
# optimise rotation on calibration data
sq.optimize(calib_data, steps=100)
# apply rotation and quantize weights in-place
sq.apply()
print(len(sq.history), type(model.model.h[0].attn.c_attn).__name__)
"""


def of_the_paper(arrays, tokens, heads=CONFIG["n_head"]):
    """GPT-2 in NumPy float64, from a checkpoint with its names and its orientation of matrices."""
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def linear(x, name):
        return x @ arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    batch, length = tokens.shape
    x = arrays["wte.weight"][tokens] + arrays["wpe.weight"][:length]
    for block in range(CONFIG["n_layer"]):
        q, k, v = (
            part.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
            for part in np.split(linear(norm(x, f"h.{block}.ln_1"), f"h.{block}.attn.c_attn"), 3, axis=-1)
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores = np.where(arrays[f"h.{block}.attn.bias"][:, :, :length, :length] > 0, scores, -1e9)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        seen = (p / p.sum(-1, keepdims=True)) @ v
        x = x + linear(seen.transpose(0, 2, 1, 3).reshape(batch, length, -1), f"h.{block}.attn.c_proj")
        h = linear(norm(x, f"h.{block}.ln_2"), f"h.{block}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{block}.mlp.c_proj")
    return norm(x, "ln_f") @ arrays["wte.weight"].T


@mlxlm
def test_the_hubs_gpt2_computes_what_it_should(tmp_path):
    pytest.importorskip("mlx_lm")
    model = GPT.from_pretrained(str(gpt2_checkpoint(tmp_path / "gpt2")))
    expected = of_the_paper(gpt2_weights(), TOKENS)
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), expected, atol=1e-4 * np.abs(expected).max())
    assert (model.config.vocab_size, model.config.n_positions) == (260, 24)


@mlxlm
def test_the_documented_lines_run_on_the_cache_of_the_hub(tmp_path):
    """As a script, offline: a repository that was downloaded is found under its short name."""
    pytest.importorskip("mlx_lm")
    environment = os.environ | {"HF_HUB_CACHE": str(hub_cache(tmp_path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", README], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["100", "QuantizedLinear"], done.stderr
    name = "import mlxquant as mq; print(mq.load('gpt2').name)"
    done = subprocess.run([sys.executable, "-c", name], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["mlx-lm"], done.stderr


def test_what_is_not_in_the_cache_is_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", README], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        "mlxquant.errors.ArtifactError: gpt2 could not be asked what it holds"
    )


def test_gpts_of_our_own(tmp_path):
    folder = gpt_folder(tmp_path / "gpt")
    model, loaded = GPT.from_pretrained(str(folder)), mq.load(folder).module
    assert isinstance(model, GPT)
    for name, value in parameters(loaded).items():
        np.testing.assert_array_equal(np.array(parameters(model)[name]), np.array(value))
    assert GPT.from_pretrained("gpt-python").config.n_layer == 4


@mlxlm
def test_other_models_are_refused_by_their_kind(tmp_path):
    pytest.importorskip("mlx_lm")
    with pytest.raises(AdapterError, match=r"is a llama and no gpt2; mlxquant\.load loads it"):
        GPT.from_pretrained(str(llama_folder(tmp_path / "llama")))
    with pytest.raises(AdapterError, match=r"otherwise than GPT-2 \(\{'activation_function': 'relu'\}\)"):
        GPT.from_pretrained(str(gpt2_checkpoint(tmp_path / "relu", activation_function="relu")))
    with pytest.raises(AdapterError, match="mmdit-shapes is a mmdit-shapes and no gpt2"):
        GPT.from_pretrained("mmdit-shapes")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(AdapterError, match="unknown model 'gpt3'"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ArtifactError, match="holds no model"):
        GPT.from_pretrained("/")


def test_making_one_needs_no_file():
    assert tiny_gpt(OURS).config == OURS
