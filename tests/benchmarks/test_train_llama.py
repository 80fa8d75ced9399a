"""benchmarks/train_llama.py: a killed run goes on to the same bytes, and the folder is one that anybody loads."""

import json
from importlib import import_module
from pathlib import Path

import mlxquant as mq  # before mlx

# isort: split
import pytest
from click.testing import CliRunner

from mlxquant.calibration.corpus import Corpus

from support.tiny_language import TEXT

pytestmark = pytest.mark.mlxlm
mlx_lm = pytest.importorskip("mlx_lm")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = import_module("train_llama")
    monkeypatch.setattr(module, "read_corpus", lambda: Corpus("test", TEXT, TEXT[:600]))
    monkeypatch.setattr(module, "SHAPE", module.SHAPE | {"num_hidden_layers": 1, "intermediate_size": 64})
    return module


def run(script, out):
    arguments = ["--out", str(out), "--steps", "3", "--batch-size", "1", "--windows", "1"]
    return CliRunner().invoke(script.main, arguments, catch_exceptions=False)


def test_a_killed_run_ends_with_the_same_bytes(script, tmp_path, monkeypatch):
    whole = json.loads(run(script, tmp_path / "whole").stdout.splitlines()[-1])
    original = script.batch

    def killed(tokens, seed, step, *rest):
        if step == 2:
            raise RuntimeError("killed")
        return original(tokens, seed, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(script, "batch", killed)
        patched.setattr(script.TrainingRun, "due", True)
        with pytest.raises(RuntimeError, match="killed"):
            run(script, tmp_path / "killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = json.loads(run(script, tmp_path / "killed").stdout.splitlines()[-1])
    assert again["bits_per_character"] == whole["bits_per_character"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    model, tokenizer = mlx_lm.load(str(tmp_path / "whole"))
    assert tokenizer.encode("def") == list(b"def")
    assert model.layers[0].self_attn.k_proj.weight.shape == (64, 128)
    ours = mq.load(tmp_path / "whole").language
    assert (ours.name, ours.context) == ("mlx-lm", 256)
