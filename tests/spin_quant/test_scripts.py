"""SpinQuant as a script uses it: rotate and quantize in place, while training too, and its two examples."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models.gpt.files import save_gpt
from mlxquant.models.gpt.network import GPT, GPTConfig
from mlxquant.models.gpt.tokenizers import ByteTokenizer
from mlxquant.spin_quant import SpinQuant
from mlxquant.spin_quant.files import FILE, load_spun, save_spun

from support.language_models import randomised

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = GPTConfig(vocab_size=256, n_positions=32, n_embd=32, n_head=2, n_layer=1)


def test_rotate_and_quantize_in_place():
    model = randomised(GPT(CONFIG))  # load your model
    before = sum(value.nbytes for value in parameters(model).values())
    sq = SpinQuant(model, bits=4)
    calib_data = [mx.random.randint(0, model.config.vocab_size, (1, 16), key=mx.random.key(i)) for i in range(8)]
    # optimise rotation on calibration data
    sq.optimize(calib_data, steps=5)
    # apply rotation and quantize weights in-place
    sq.apply()
    assert len(sq.history) == 5
    assert "scales" in model.model.h[0].attn.c_attn
    assert sum(value.nbytes for value in parameters(model).values()) < before


def test_optimising_while_training():
    """Optimize on a few batches now and then, and apply after training."""
    model = randomised(GPT(CONFIG))
    sq, text = SpinQuant(model, bits=3, start="random"), [np.arange(64).reshape(2, 32)]
    for _ in range(2):
        sq.optimize(text, steps=2)
        layer = model.model.h[0].mlp.c_fc
        layer.weight = layer.weight + 0.01  # a training step
    last = model.model.h[0].mlp.c_fc.weight
    sq.rotate()
    rotation, gain = sq.rotations["residual"], None
    found = np.array(model.model.h[0].mlp.c_fc.weight)
    fresh = randomised(GPT(CONFIG)).model.h[0].ln_2.weight
    gain = np.array(fresh)
    np.testing.assert_allclose(found, np.array(last) * gain @ rotation, atol=1e-5)
    assert len(sq.history) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gpt")
    save_gpt(place / "gpt", randomised(GPT(CONFIG)), ByteTokenizer(), {})
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return place


def demo(name, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)], capture_output=True, text=True
    )


def test_the_examples_run_one_after_the_other(folder):
    out = folder / "spinquant_out"
    options = ("--steps", 2, "--bits", 4, "--activation-bits", 8, "--kv_bits", 8, "--batches", 2, "--batch_size", 2)
    done = demo("spinquant_ptq", "--ckpt", folder / "gpt", "--data", folder / "text.txt", "--out_dir", out, *options)
    assert done.returncode == 0, done.stderr
    assert '"bits_per_token"' in done.stdout.splitlines()[-1]
    assert "8 layers" not in done.stderr
    assert "MB became" in done.stderr
    again = demo("spinquant_ptq", "--model", folder / "gpt", "--data", folder / "text.txt", "--out-dir", out)
    assert again.returncode == 1
    assert "--force" in again.stderr
    texts = [
        demo("spinquant_sample", "--ckpt", place, "--prompt", "Test", "--max_new_tokens", 20)
        for place in (out, out / FILE)
    ]
    assert [done.returncode for done in texts] == [0, 0], texts[0].stderr
    assert texts[0].stdout.startswith("Test")
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.parametrize("options", [{}, {"activation_bits": 4, "kv_bits": 4, "group": 32}])
def test_what_is_saved_loads_to_the_same_logits(tmp_path, options):
    model, tokens = randomised(GPT(CONFIG)), mx.array(np.arange(48).reshape(2, 24))
    SpinQuant(model, **options).optimize([np.arange(64).reshape(2, 32)], steps=2).apply()
    path = save_spun(tmp_path, model, ByteTokenizer(), {"seed": 0})
    loaded, tokenizer, facts = load_spun(tmp_path)
    np.testing.assert_array_equal(np.array(loaded(tokens)), np.array(model(tokens)))
    assert tokenizer.vocab_size == 256
    assert facts == {"seed": 0}
    content = path.read_bytes()
    save_spun(tmp_path, loaded, tokenizer, facts)
    assert path.read_bytes() == content


def test_checkpoints_of_torch_are_refused_by_both_examples(tmp_path):
    done = demo("spinquant_sample", "--ckpt", tmp_path / "out/ckpt_spinquant.pt", "--prompt", "Test")
    assert done.returncode == 1
    said = (
        f"Error: {tmp_path}/out/ckpt_spinquant.pt: a pickle (.pt) runs whatever code is in it when it is read; mlxquant"
    )
    assert done.stderr.startswith(f"{said} has none, pass the folder, {tmp_path}/out, with spinquant.safetensors in it")
    done = demo("spinquant_ptq", "--ckpt", tmp_path / "ckpt.pt")
    assert done.stderr.endswith(f"pass the folder, {tmp_path}, if train-gpt wrote it\n")
    assert done.stderr.count("\n") == 1


def test_another_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        load_spun(tmp_path)
    (tmp_path / FILE).write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match="damaged"):
        load_spun(tmp_path)
