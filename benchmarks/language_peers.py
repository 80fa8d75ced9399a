"""Language models against the field: ``python benchmarks/language_peers.py --work WORK --llama FOLDER``.

mlx-lm's ways to quantize (``mlx_lm_contenders.py``: plain rounding, ``gptq``, ``awq``, ``dynamic_quant``, ``dwq``)
beside recipes of ours, on ``gpt-python`` and on the Llama that ``train_llama.py`` trains: the same calibration windows,
layers and formats, embeddings in full precision, so that models are equally large. Rows named ``mlx-lm METHOD`` alone
are what its command does by default, and have other sizes. Bits a weight are those of the whole model, by mlx-lm's own
count; rows go by them.

What is reported is separate from what was chosen: held-out windows that other benchmarks of this folder look at are
left out, so no default of ours was chosen on these. Ours are exported and read by stock mlx-lm, which predicts for all,
in float32 with weights unpacked, since packed kernels are slow on CPUs. Seconds are of quantizing alone: of the CPU,
and of the wall, which others on the machine lengthen. Differences are to full precision, window by window, with
bootstrap 95 % intervals.

Rows that are in ``WORK.jsonl`` already are not computed again; those behind the docs are in
``benchmarks/results/language_peers.jsonl``. ``--recipes`` takes any methods, or whole recipes. The last line of stdout
is one JSON object. Needs the extra ``mlx-lm``.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

import language
from mlxquant.calibration.corpus import read_corpus
from mlxquant.calibration.text import TextCalibration
from mlxquant.commandline.console import progress, result, say
from mlxquant.errors import RecipeError
from mlxquant.layers.tree import find_linears, parameters
from mlxquant.metrics.prediction import Prediction, cut, predict_windows, spread
from mlxquant.models.language import Tokens
from rows import Rows, read, without_head

GPT, LLAMA = "gpt-python", "llama"
EXACT, THEIRS = "full precision", "mlx-lm "
FORMATS = ("w4-g64", "w4-g128", "w3-g64", "w2-g64")
METHODS = ("rtn", "gptq", "awq", "dynamic_quant", "dwq", "dwq*1e-4", "dwq*1e-3")
DEFAULTS = ("rtn", "gptq", "awq", "dynamic_quant")  # and dwq, whose 2048 windows are 512 steps of training
RECIPES = "rtn gptq gptq+unclipped mixed"
ALL = 10**9  # windows
LOOKED_AT = (128, 256, 1000)  # how many windows of the held-out text other benchmarks take
TITLES = "bits a weight | bits per character | lost (95 %) | perplexity | CPU seconds | wall"


def unseen(count: int, limit: int) -> Tokens:
    """Which ``limit`` of ``count`` windows are read here: spread over those that no choice was made on."""
    looked_at = [spread(count, number) for number in LOOKED_AT if number < count]
    left = np.setdiff1d(np.arange(count, dtype=np.int32), np.concatenate([np.zeros(0, np.int32), *looked_at]))
    return left[spread(len(left), min(limit, len(left)))]


def names(recipes: str, formats: tuple[str, ...], methods: tuple[str, ...], defaults: tuple[str, ...]) -> Iterator[str]:
    """What is measured, format by format, theirs and ours; then recipes that bring their format, and defaults."""
    yield EXACT
    ours = recipes.split()
    for form in formats:
        yield from (f"{THEIRS}{method}-{form}" for method in methods)
        yield from (f"{method}-{form.replace('-', 'a16-')}" for method in ours if not has_format(method))
    yield from (recipe for recipe in ours if has_format(recipe))
    yield from (THEIRS + method for method in defaults)


def has_format(recipe: str) -> bool:
    return re.search(r"-w\d", recipe) is not None


def stock(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The folder in stock mlx-lm, as it is stored, and its config."""
    from mlx_lm.utils import load_model  # an extra

    model, config = load_model(folder)
    mx.eval(model.parameters())
    return model, config


def precise(model: nn.Module) -> nn.Module:
    """The same numbers in float32, without packed layers."""
    from mlx_lm.utils import dequantize_model  # an extra

    model.set_dtype(mx.float32)  # before weights are unpacked, which would be rounded to float16
    return dequantize_model(model)


class Bench:
    """A model, the text, and the finished rows.

    Args:
        work: What ``--work`` says.
        name: What the model is called.
        folder: Where it is.
        windows: Of held-out text.
        samples: Windows of calibration text.
    """

    def __init__(self, work: Path, name: str, folder: Path, windows: int, samples: int):
        self.folder, self.samples = folder, samples
        self.model, corpus = mq.load(folder), read_corpus()
        adapter = self.model.language
        tokens = adapter.tokenizer.encode(corpus.held_out)
        self.windows = cut(tokens, adapter.context, unseen((len(tokens) - 1) // adapter.context, windows))
        self.rows = Rows(
            work, model=name, weights=adapter.fingerprint[:8], text=str(corpus.facts["sha256"])[:8],
            windows=len(self.windows), samples=samples,
        )  # fmt: skip

    @cached_property
    def text(self) -> TextCalibration:
        """All windows to calibrate on, in an order that is drawn once."""
        every = mq.calibrate_text(self.model, samples=ALL)
        return replace(every, windows=np.random.default_rng(0).permutation(every.windows))

    def measure(self, name: str) -> dict[str, Any]:
        """A row; RecipeError where there is no such thing for this model."""
        if name == EXACT:
            model, spent = stock(self.folder)[0], {"seconds": 0.0, "wall_seconds": 0.0}
        elif name.startswith(THEIRS):
            model, spent = self.theirs(name.removeprefix(THEIRS))
        else:
            model, spent = self.ours(name)
        return {**spent, **sizes(model), **self.predicted(model)}

    def theirs(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        from mlx_lm_contenders import VALIDATION, Contender, Text  # of an extra

        contender = Contender.parse(name, self.samples)
        widths = {layer.weight.shape[1] for layer in find_linears(self.model.language.module).values()}
        if odd := [width for width in sorted(widths) if width % contender.group]:
            raise RecipeError(f"{odd[0]} inputs of a layer are no multiple of {contender.group}")
        text = Text(
            *(mx.array(part) for part in (self.text.windows[: contender.windows], self.text.windows[-VALIDATION:]))
        )
        model, config = stock(self.folder)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        clock = Clock()
        model = contender.quantize(model, config, text)
        return model, {**clock.spent(), "calibrated": contender.windows, "mlx_lm": version("mlx-lm")}

    def ours(self, recipe: str) -> tuple[nn.Module, dict[str, Any]]:
        """A recipe, exported and read by stock mlx-lm; ``differs`` is by how much its logits are not ours."""
        calib = replace(self.text, windows=self.text.windows[: self.samples])
        clock = Clock()
        done = mq.quantize(self.model, calib, recipe, progress=progress)
        spent = clock.spent()
        some = mx.array(self.windows[:1, :-1])
        with TemporaryDirectory() as work:
            mq.export(done, Path(work) / "out", "mlx-lm")
            model, again = (stock(Path(work) / "out")[0] for _ in range(2))
        done.language.module.set_dtype(mx.float32)  # as mlx-lm's is
        differs = mx.abs(done.language.logits(some) - precise(again)(some)).max()
        return model, {**spent, "calibrated": self.samples, "differs": differs.item()}

    def predicted(self, model: nn.Module) -> dict[str, Any]:
        found = predict_windows(precise(model), self.model.language.tokenizer, self.windows, progress=progress)
        return {key: getattr(found, key).tolist() for key in ("nats", "tokens", "characters")}


class Clock:
    """Seconds from now on, of this process and of the wall."""

    def __init__(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def spent(self) -> dict[str, float]:
        cpu, wall = self.began
        return {"seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def sizes(model: nn.Module) -> dict[str, Any]:
    from mlx_lm.utils import compute_bits_per_weight  # an extra

    stored = sum(value.nbytes for value in parameters(model).values())
    return {"bits_per_weight": compute_bits_per_weight(model), "bytes": stored}


def measured(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of a file by model and name; ClickException where a model's are of several weights or texts, or where
    it has none in full precision.
    """
    kinds: dict[str, set[str]] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read(file):
        name = row["of"]["model"]
        kinds.setdefault(name, set()).add(str(row["of"]))
        found.setdefault(name, {})[row["name"]] = without_head(row)
    for name, rows in found.items():
        if len(kinds[name]) != 1:
            raise click.ClickException(
                f"{file}: rows of {' and '.join(sorted(kinds[name]))}; expected them to be of one"
            )
        if EXACT not in rows:
            raise click.ClickException(f"{file}: no row {EXACT!r} of {name}; measure any contender into it")
    return found


def summaries(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of a model's rows."""
    return {name: summary(row, rows[EXACT]) for name, row in rows.items()}


def summary(row: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    mine = Prediction(*(np.array(row[key]) for key in ("nats", "tokens", "characters")))
    rest = {key: row[key] for key in ("wall_seconds", "calibrated", "differs") if key in row}
    return {**language.summary(row, exact), "perplexity": mine.perplexity, **rest}


def tables(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A table a model, the smallest first; within a hundredth of a bit by what is lost."""
    parts = []
    for name, rows in found.items():
        figures = summaries(rows)
        order = sorted(figures, key=lambda row: (round(figures[row]["bits_per_weight"], 2), figures[row]["difference"]))
        lines = [line(row, figures[row]) for row in order]
        parts.append("\n".join([f"| {name} | {TITLES} |", "|---" * (TITLES.count("|") + 2) + "|", *lines]))
    return "\n\n".join(parts)


def line(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["difference_95"]
    lost = "" if name == EXACT else f"{figures['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    spent = "| " if name == EXACT else f"{figures['seconds']:.0f} | {figures['wall_seconds']:.0f}"
    return (
        f"| `{name}` | {figures['bits_per_weight']:.2f} | {figures['bits_per_character']:.4f} | {lost} "
        f"| {figures['perplexity']:.4f} | {spent} |"
    )


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
@click.option("--llama", type=click.Path(path_type=Path, exists=True), help="What train_llama.py wrote.")
@click.option("--only", type=click.Choice([GPT, LLAMA]), help="One of the models.")
@click.option("--recipes", default=RECIPES, show_default=True, help="Of ours: methods, or recipes with a format.")
@click.option("--row", "rows", multiple=True, help="Only these rows, such as 'mlx-lm dwq*1e-3-w4-g64@256'.")
@click.option("--windows", default=256, show_default=True, help="Of held-out text.")
@click.option("--samples", default=64, show_default=True, help="Windows of calibration text.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
def main(
    work: Path, llama: Path | None, only: str | None, recipes: str, rows: tuple[str, ...], windows: int, samples: int,
    table: bool,
) -> None:  # fmt: skip
    refused = {}
    with as_file(files("mlxquant.assets") / GPT) as embedded:
        places = {GPT: embedded, **({LLAMA: llama} if llama else {})}
        for name, folder in places.items():
            if table or only not in (None, name):
                continue
            bench = Bench(work, name, folder, windows, samples)
            wanted = (EXACT, *rows) if rows else tuple(names(recipes, FORMATS, METHODS, DEFAULTS))
            for row in wanted:
                try:
                    bench.rows.kept(row, partial(bench.measure, row))
                except RecipeError as error:
                    refused[f"{name}: {row}"] = str(error)
                    say(f"{name}: {row}: {error}")
    found = measured(Rows(work).file)
    say(tables(found))
    figures = {name: summaries(rows) for name, rows in found.items()}
    result({"platform": platform.platform(), "models": figures, "refused": refused})


if __name__ == "__main__":
    main()
