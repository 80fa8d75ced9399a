"""GPTQ side by side with ``mlx_lm.quant.gptq``, on the same model, text and bits, in one run: ``python
benchmarks/language_peers.py``.

The model is ``gpt-python``, or with ``--folder`` any folder that mlx-lm loads, in float32; the text 64 windows of 256
tokens; groups of
64. Embeddings are in full precision on both sides (mlx-lm's are put back after it has quantized them). Held-out bits
    per character are
those of stock mlx-lm's forward pass, ours from the exported folder, weights dequantized for the sake of CPUs, whose
packed kernels are
slow. Times are wall time of quantizing alone, alternating, median of ``--repeats``. The last line of stdout is one JSON
object. Needs the
extra ``mlx-lm``.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import dequantize_model, load_model

from mlxquant.calibration.corpus import read_corpus
from mlxquant.commandline.console import result, say
from mlxquant.layers.tree import set_module
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.prediction import Prediction, predict

GROUP = 64
METHODS = ("gptq+unclipped", "gptq+unclipped+corrected", "qronos+unclipped", "rtn", "gptq", "descent", "qronos")


def stock(folder: Path) -> nn.Module:
    """The folder in stock mlx-lm, float32."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def theirs(model: nn.Module, windows: mx.array, bits: int) -> None:
    """Quantize in place by mlx-lm, embeddings as they were."""
    embeddings = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    gptq_quantize(model, windows, bits, GROUP, bits, GROUP)
    for path, module in embeddings.items():
        set_module(model, path, module)
    mx.eval(model.parameters())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    made = run()
    return made, time.perf_counter() - start


@click.command(help=__doc__)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True),
    help="A folder that mlx-lm loads.  [default: gpt-python's]",
)
@click.option(
    "--bits", type=click.Choice([2, 4, 8]), default=4, show_default=True, help="Those that mlx-lm's GPTQ knows."
)
@click.option("--samples", default=64, show_default=True)
@click.option("--windows", default=128, show_default=True, help="Of held-out text.")
@click.option("--repeats", default=3, show_default=True)
def main(folder: Path | None, bits: int, samples: int, windows: int, repeats: int) -> None:
    with as_file(files("mlxquant.assets") / "gpt-python") as embedded, tempfile.TemporaryDirectory() as work:
        source = embedded if folder is None else folder
        recipes = [f"{method}-w{bits}a16-g{GROUP}" for method in METHODS]
        model, corpus = mq.load(source), read_corpus()
        adapter = model.language
        adapter.module.set_dtype(mx.float32)
        calib = mq.calibrate_text(model, samples=samples)
        tokens = mx.array(calib.windows)

        def measured(run: Callable[[mx.array], mx.array]) -> Prediction:
            return predict(run, adapter.tokenizer, corpus.held_out, adapter.context, windows)

        times: dict[str, list[float]] = {name: [] for name in ("mlx-lm", *recipes)}
        found = {"full precision": measured(stock(source))}
        for repeat in range(repeats):
            other = stock(source)
            times["mlx-lm"].append(timed(lambda other=other: theirs(other, tokens, bits))[1])
            if not repeat:
                found["mlx-lm"] = measured(dequantize_model(other))
            for recipe in recipes:
                done, seconds = timed(lambda recipe=recipe: mq.quantize(model, calib, recipe))
                times[recipe].append(seconds)
                if not repeat:
                    out = Path(work) / recipe
                    mq.export(done, out, "mlx-lm")
                    again = stock(out)
                    difference = float(np.array(mx.abs(again(tokens[:1]) - done.language.logits(tokens[:1])).max()))
                    say(f"{recipe}: logits in stock mlx-lm differ from ours by {difference:.2g}")
                    found[recipe] = measured(dequantize_model(again))
        exact, first = found["full precision"], found["mlx-lm"]
        facts = {}
        for name, prediction in found.items():
            gain = prediction.each - first.each
            facts[name] = {
                "bits_per_character": prediction.bits_per_character,
                "lost": prediction.bits_per_character - exact.bits_per_character,
                "perplexity": prediction.perplexity,
                "against_mlx_lm": float(gain.mean()),
                "against_mlx_lm_95": interval(gain),
                "seconds": float(np.median(times[name])) if name in times else None,
                "seconds_each": times.get(name),
            }
            say(
                f"{name:24} {prediction.bits_per_character:.5f} bits per character, {facts[name]['lost']:+.5f},"
                f" perplexity {prediction.perplexity:.4f}"
                + (f", {facts[name]['seconds']:.1f} s" if name in times else "")
            )
        result(
            {"bits": bits, "group": GROUP, "mlx_lm": version("mlx-lm"), "platform": platform.platform(), "rows": facts}
        )


if __name__ == "__main__":
    main()
