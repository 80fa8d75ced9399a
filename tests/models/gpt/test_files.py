"""A GPT's folder: what was saved is what is loaded, by us and by stock mlx-lm, and nothing damaged loads."""

import json

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models.gpt.files import is_gpt_folder, load_gpt, save_gpt
from mlxquant.models.gpt.network import GPTConfig
from mlxquant.models.gpt.tokenizers import ByteTokenizer, CharTokenizer
from mlxquant.qat.training import fresh_gpt

TEXT = "import os\n\n\ndef f(x):\n    return x + 'é'\n"


def tiny(tokenizer):
    return fresh_gpt(GPTConfig(tokenizer.vocab_size, 48, 32, 2, 2), 3)


def both():
    return [ByteTokenizer(), CharTokenizer(TEXT)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("tokenizer", both(), ids=lambda t: t.level)
def test_what_was_saved_is_loaded(tmp_path, tokenizer, dtype):
    model = tiny(tokenizer)
    model.set_dtype(dtype)
    save_gpt(tmp_path / "gpt", model, tokenizer, {"source": "a test"})
    again, text, facts = load_gpt(tmp_path / "gpt")
    assert facts == {"source": "a test"}
    assert text.facts == tokenizer.facts
    assert again.config == model.config
    before, after = parameters(model), parameters(again)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == dtype
        assert mx.array_equal(after[name], value)
    assert is_gpt_folder(tmp_path / "gpt")
    save_gpt(tmp_path / "twice", again, text, facts)
    for file in (tmp_path / "gpt").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes()


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    folder = tmp_path / "gpt"
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_gpt(folder)
    save_gpt(folder, tiny(ByteTokenizer()), ByteTokenizer(), {})
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum"):
        load_gpt(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_gpt(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert not is_gpt_folder(folder)
    with pytest.raises(ArtifactError, match="train-gpt"):
        load_gpt(folder)
    (folder / "config.json").write_text(config.replace('"n_embd": 32', '"n_embd": 64'))
    with pytest.raises(ArtifactError, match="has shape"):
        load_gpt(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load_gpt(folder)


@pytest.mark.mlxlm
@pytest.mark.parametrize("tokenizer", both(), ids=lambda t: t.level)
def test_stock_mlx_lm_loads_it(tmp_path, tokenizer):
    mlx_lm = pytest.importorskip("mlx_lm")
    model = tiny(tokenizer)
    save_gpt(tmp_path / "gpt", model, tokenizer, {})
    theirs, text = mlx_lm.load(str(tmp_path / "gpt"))
    ids = tokenizer.encode(TEXT)
    assert text.encode(TEXT) == ids.tolist()
    assert text.decode(ids.tolist()) == TEXT
    tokens = mx.array(ids)[None]
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(model(tokens)), atol=2e-6)
    written = mlx_lm.generate(theirs, text, TEXT, max_tokens=4)
    assert isinstance(written, str)
