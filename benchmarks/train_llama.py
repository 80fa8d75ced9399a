"""Train a Llama of 0.8 million parameters: ``python benchmarks/train_llama.py --out DIR``.

What others call a language model is mostly a Llama by its layers: mlx-lm's own class here, with grouped queries, gated
units and tied embeddings, on the text that ``gpt-python`` was trained on (the sources of Python's standard library,
the same modules held out), a token a byte. Its widths are multiples of 128, so that groups of 64 and of 128 fit.

The folder is one that the hub could have: config.json, model.safetensors in float16, tokenizer.json. Every batch is a
function of seed and step alone, and a killed run goes on to the same bytes. Needs the extra ``mlx-lm``. The last line
on stdout is one JSON object.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # noqa: F401  before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models import llama

from mlxquant.calibration.corpus import read_corpus
from mlxquant.commandline.console import progress, result, say
from mlxquant.files.atomic import atomic_file
from mlxquant.files.checked import canonical
from mlxquant.files.lock import locked
from mlxquant.files.training_run import TrainingRun
from mlxquant.layers.tree import parameters
from mlxquant.metrics.prediction import predict
from mlxquant.models.gpt.files import CONFIG, ENDLESS, WEIGHTS, write_weights
from mlxquant.models.gpt.tokenizers import BYTES, ByteTokenizer
from mlxquant.qat.training import batch, build_optimizer, training_step

LENGTH = 256  # bytes of a window
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": BYTES,
    "max_position_embeddings": LENGTH,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    **ENDLESS,
}


def fresh_model(seed: int) -> nn.Module:
    """GPT-2's start: matrices normal with deviation 0.02, those that write into the residual stream divided by sqrt(2
    layers).
    """
    model = llama.Model(llama.ModelArgs.from_dict(SHAPE))
    random = np.random.default_rng(seed)
    started = []
    for name, value in parameters(model).items():
        if value.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 / (np.sqrt(2 * SHAPE["num_hidden_layers"]) if last else 1)
            started.append((name, mx.array(random.normal(0, deviation, value.shape).astype(np.float32))))
    model.load_weights(started, strict=False)
    return model


def publish(folder: Path, model: nn.Module) -> None:
    """Weights in float16, the tokenizer, and the config last: equal weights, equal bytes."""
    write_weights(folder / WEIGHTS, {name: value.astype(mx.float16) for name, value in parameters(model).items()})
    for name, text in {**ByteTokenizer().files(), CONFIG: canonical(SHAPE)}.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder; run again to resume.")
@click.option("--steps", default=1200, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--learning-rate", default=3e-3, show_default=True, help="Peak rate of AdamW.")
@click.option("--seed", default=0, show_default=True)
@click.option("--windows", default=256, show_default=True, help="Of held-out text, for the final figure.")
def main(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int, windows: int) -> None:
    corpus, tokenizer = read_corpus(), ByteTokenizer()
    tokens = tokenizer.encode(corpus.train)
    facts = {"text": corpus.facts, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
             "seed": seed}  # fmt: skip
    model = fresh_model(seed)
    optimizer = build_optimizer(steps, learning_rate)
    optimizer.init(model.trainable_parameters())
    recent: deque[float] = deque(maxlen=50)
    began = time.process_time()
    with locked(out, inside=True):
        run = TrainingRun(out, facts)
        if found := {name: tree_unflatten(list(flat.items())) for name, flat in run.resume().items()}:
            model.update(found["model"])
            optimizer.state = found["optimizer"]
        with run.same_blas():
            update = training_step(model, optimizer)
            for step in progress(range(run.step, steps), "train", done=run.step, note=lambda: f"loss {mean(recent)}"):
                recent.append(float(np.array(update(*batch(tokens, seed, step, batch_size, LENGTH)))))
                run.step = step + 1
                if run.due or run.step == steps:
                    trees = {"model": model.parameters(), "optimizer": optimizer.state}
                    run.save(trees, finished=run.step == steps)
            publish(out, model)
    seconds = time.process_time() - began
    found = predict(model, tokenizer, corpus.held_out, LENGTH, windows, progress=progress)
    say(f"{out}: {found.bits_per_character:.4f} bits per character of held-out text")
    result({
        "folder": str(out), **facts, "parameters": sum(value.size for value in parameters(model).values()),
        "loss": mean(recent), "bits_per_character": found.bits_per_character, "cpu_seconds": seconds,
    })  # fmt: skip


def mean(recent: deque[float]) -> float | None:
    return round(float(np.mean(recent)), 4) if recent else None


if __name__ == "__main__":
    main()
