"""SpinQuant from a trained GPT to a small file: learn rotations on text, fold them, round the weights, save.

python examples/spinquant_ptq.py --ckpt FOLDER --data FILE --out-dir spinquant_out
python examples/spinquant_sample.py --ckpt spinquant_out --prompt "Test" --max_new_tokens 20
"""

from __future__ import annotations

import mlxquant  # noqa: F401  # before mlx, so that MLX gets a fast BLAS

# isort: split
from math import log
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlxquant.calibration.corpus import read_corpus
from mlxquant.commandline.console import Command, progress, result, say
from mlxquant.errors import ArtifactError, CalibrationError
from mlxquant.files.atomic import ensure_writable
from mlxquant.files.pickles import refuse_pickle
from mlxquant.models.gpt.adapter import EMBEDDED
from mlxquant.qat.adapter import TrainedGPT
from mlxquant.qat.folders import QUANTIZATION
from mlxquant.qat.training import batch, loss
from mlxquant.spin_quant import SpinQuant
from mlxquant.spin_quant.files import FILE, save_spun


def windows(tokens, count, size, length, seed):
    """``count`` arrays of ``size`` pieces of a text, int [size,length]."""
    if len(tokens) <= length:
        raise CalibrationError(
            f"a text of {len(tokens)} tokens is too short for pieces of {length}; pass a longer one with --data"
        )
    return [np.array(batch(tokens, seed, step, size, length)[0]) for step in range(count)]


def bits_per_token(model, arrays):
    """Of a model on token arrays."""
    return float(np.mean([loss(model, mx.array(a[:, :-1]), mx.array(a[:, 1:])).item() for a in arrays])) / log(2)


@click.command(cls=Command)
@click.option("--ckpt", "--model", "place", default=EMBEDDED, show_default=True, help="A folder that train-gpt wrote.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Text to calibrate on; its end is held out.  [default: Python's library]",
)
@click.option(
    "--out-dir", "--out_dir", type=click.Path(path_type=Path), default=Path("spinquant_out"), show_default=True
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Cayley steps; 0 leaves the rotations as they start.",
)
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="Of weights.")
@click.option(
    "--activation-bits", "--activation_bits", type=click.Choice(["4", "6", "8", "16"]), default="16", show_default=True
)
@click.option("--kv-bits", "--kv_bits", type=click.Choice(["4", "6", "8", "16"]), default="16", show_default=True)
@click.option("--start", type=click.Choice(["hadamard", "random"]), default="hadamard", show_default=True)
@click.option(
    "--batches", type=click.IntRange(1), default=8, show_default=True, help="Of text to learn and calibrate on."
)
@click.option("--batch-size", "--batch_size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--length", type=click.IntRange(2), help="Of pieces of text.  [default: the model's context]")
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing result.")
def command(
    place, data, out_dir, steps, bits, activation_bits, kv_bits, start, batches, batch_size, length, seed, force
):
    """Quantize a GPT with SpinQuant."""
    if (out_dir / FILE).exists() and not force:
        raise ArtifactError(f"{out_dir / FILE} exists; choose another folder or pass --force to replace it")
    refuse_pickle(Path(place), f"pass the folder, {Path(place).parent}, if train-gpt wrote it")
    adapter, corpus = TrainedGPT.pretrained(place), read_corpus(data)
    model, tokenizer = adapter.module, adapter.tokenizer
    length = min(length or model.config.n_positions, model.config.n_positions)
    text = windows(tokenizer.encode(corpus.train), batches, batch_size, length, seed)
    held_out = windows(tokenizer.encode(corpus.held_out), min(batches, 4), batch_size, length, seed + 1)
    before = bits_per_token(model, held_out)
    activation, held = (None if value == "16" else int(value) for value in (activation_bits, kv_bits))
    spin = SpinQuant(model, bits, activation, start, seed, kv_bits=held)
    ensure_writable(out_dir)
    if steps:
        spin.optimize(text, steps, progress=progress)
    spin.apply(text, progress=progress)
    after = bits_per_token(model, held_out)
    facts = {
        "bits": bits,
        "activation_bits": activation,
        "kv_bits": held,
        "steps": steps,
        "start": start,
        "seed": seed,
        "text": corpus.facts,
        QUANTIZATION: adapter.facts.get(QUANTIZATION, {}),
    }
    path = save_spun(out_dir, model, tokenizer, facts)
    say(f"{spin.report}\nheld-out bits a token: {before:.4f} before, {after:.4f} after\nwritten to {path}")
    result({"bits_per_token": after, "full_precision": before, "bytes": path.stat().st_size, "out": str(out_dir)})


if __name__ == "__main__":
    command()
