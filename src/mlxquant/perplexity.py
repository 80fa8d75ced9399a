"""``mlxquant perplexity``: how well language models predict text that nobody calibrated or trained on, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from .api.loading import load
from .api.model import Model, QuantizedModel
from .calibration.corpus import read_corpus
from .commandline.console import Command, peak_bytes, progress, result, say
from .commandline.options import COUNT, PATH, models_option, option, verbose_option
from .metrics.bootstrap import interval
from .metrics.prediction import Prediction


@click.command("perplexity", cls=Command)
@models_option("gpt-python, a folder or a hub id; the first is the reference.")
@option("--data", type=PATH, help="A text file, whose end is used.  [default: Python's standard library]")
@option("--length", type=click.IntRange(2), help="Tokens of a window.  [default: the first model's]")
@option("--windows", type=COUNT, help="At most so many windows, evenly spread.  [default: all of the held-out text]")
@verbose_option
def command(names: tuple[str, ...], data: Path | None, length: int | None, windows: int | None) -> None:
    """Measure how well language models predict a text.

    In bits per character of the part that is held out: less is better.
    """
    corpus = read_corpus(data)
    rows: dict[str, dict[str, Any]] = {}
    first: Prediction | None = None
    for name in names:
        start = time.perf_counter()
        model = load(name)
        if length is None:
            length = model.language.context
        found = model.predict(corpus.held_out, length, windows, progress)
        first = found if first is None else first
        rows[name] = {
            "bits_per_character": found.bits_per_character,
            "perplexity": found.perplexity,
            "tokens": int(found.tokens.sum()),
            "seconds": time.perf_counter() - start,
            **compared(found, first),
            **stored(model),
        }
        say(line(name, rows[name]))
    result({"text": corpus.facts, "length": length, "models": rows, "peak_bytes": peak_bytes()})


def compared(found: Prediction, first: Prediction) -> dict[str, Any]:
    """The difference to the reference in bits per character with its interval, where both have the same windows."""
    if found is first or len(found.nats) != len(first.nats) or not np.array_equal(found.characters, first.characters):
        return {}
    difference = found.each - first.each
    return {"difference": float(difference.mean()), "difference_95": interval(difference)}


def stored(model: Model) -> dict[str, Any]:
    """Its size, where it is quantized."""
    if not isinstance(model, QuantizedModel):
        return {}
    return {"model_bytes": model.size.model_bytes, "bits_per_weight": model.size.bits_per_weight}


def line(name: str, row: dict[str, Any]) -> str:
    text = f"{name}: {row['bits_per_character']:.4f} bits per character, perplexity {row['perplexity']:.3f}"
    if "difference" in row:
        text += f", {row['difference']:+.4f}"
        text += (
            ""
            if row["difference_95"] is None
            else f" ({row['difference_95'][0]:+.4f} to {row['difference_95'][1]:+.4f})"
        )
    return text + (f", {row['bits_per_weight']:.2f} bits per weight" if "bits_per_weight" in row else "")


if __name__ == "__main__":
    command()
