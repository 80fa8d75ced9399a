"""Which method is best, and at what: ``python benchmarks/which_method.py --work WORK``.

Every method at six formats on ``mmdit-shapes``: PSNR of the decoded picture against full precision at the same seed on
held-out prompts (mean and bootstrap 95 % interval), the paired difference to ``gptq`` in the same format with its
interval, attribute accuracy, stored bits a weight of the whole model, and CPU seconds to quantize. Calibration is the
same for all: 16 prompts, 28 steps. Rows that are in ``WORK.jsonl`` already are not computed again, so several processes
may share it; those behind the docs are in ``benchmarks/results/which_method.jsonl``. ``--table`` prints what is there.
After the rows comes one table of PSNR and accuracy, methods by formats. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
from mlxquant.commandline.console import progress, result, say
from mlxquant.metrics.bootstrap import interval
from pictures import Pictures
from rows import Rows

CALIBRATION = 16  # prompts
FORMATS = ("w8a8", "w4a16", "w4a8", "w4a4", "w3a8", "w2a16")
WEIGHTS = [
    "rtn",
    "gptq",
    "gptq+damped",
    "gptq+sensitivity",
    "descent",
    "descent+refit",
    "gptq+corrected",
    "qronos",
    "gptaq",
    "smoothquant",
    "gptq+smoothquant",
    "gptq+ptq4dit",
    "gptq+tcaq",
    "quarot",
    "gptq+smoothquant+rotation",
    "svdquant",
    "gptq+svd8",
    "gptq+whitened8",
    "mixed",
]
RANGES = ["average", "error", "grouped", "envelope", "tdq", "logsnr", "dynamic"]
LEARNED = ["adaround", "tcaqdm", "taqdit", "taqdit+rotation"]
BEST = ["gptq+smoothquant+rotation+mixed", "gptq+smoothquant+rotation+sensitivity"]


def rows() -> list[str]:
    """What is measured, the quick rows first."""
    quick = [f"{method}-{form}" for method in WEIGHTS for form in FORMATS]
    quick += [f"gptq+{method}-{form}" for method in RANGES for form in FORMATS if not form.endswith("a16")]
    quick += [f"gptq+softmax{form[3:]}-{form}" for form in FORMATS if not form.endswith("a16")]
    quick += [f"gptq+progressive-{form}" for form in FORMATS if not form.endswith("a16")]
    return (
        quick
        + [f"{method}-{form}" for method in BEST for form in FORMATS]
        + [f"{m}-{form}@300" for m in LEARNED for form in FORMATS]
    )


def measure(pictures: Pictures, name: str) -> dict[str, Any]:
    """A recipe, perhaps with ``@N``: N iterations where it learns."""
    recipe_name, _, iterations = name.partition("@")
    recipe = mq.parse_recipe(recipe_name)
    if iterations:
        recipe = replace(recipe, learning=replace(recipe.learning, iterations=int(iterations)))
    calib = pictures.calibration(CALIBRATION)
    start = time.process_time()
    done = mq.quantize(pictures.model, calib, recipe, progress=progress)
    seconds = time.process_time() - start
    decibels, accuracy = pictures.scores(done)
    stages = [s for s in done.facts["stages"] if "errors" in s]
    transforms = [kept["kept"] for s in stages for kept in s.get("transforms", {}).values()]
    widths = [float(np.mean(layer.table.bits)) for layer in done.layers.values() if layer.table is not None]
    return {
        "psnr_each": decibels.tolist(),
        "accuracy": accuracy["mean"],
        "bits_per_weight": done.size.bits_per_weight,
        "activation_bits": float(np.mean(widths)) if widths else 16.0,
        "seconds_quantize": seconds,
        "kept": [s["kept"] for s in stages],
        "transforms_kept": f"{sum(transforms)} of {len(transforms)}" if transforms else "",
    }


def summary(row: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of a row, with the paired difference to ``base``, gptq in the same format, where that is there."""
    each = np.array(row["psnr_each"])
    figures = {
        key: row[key]
        for key in ("accuracy", "bits_per_weight", "activation_bits", "seconds_quantize", "transforms_kept")
    }
    figures |= {"psnr_db": float(each.mean()), "psnr_95": interval(each)}
    if base is not None:
        gain = each - np.array(base["psnr_each"])
        figures |= {"gain_db": float(gain.mean()), "gain_95": interval(gain)}
    return figures


def summaries(wanted: Iterable[str], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: summary(rows[name], rows.get(f"gptq-{format_of(name)}")) for name in wanted}


def format_of(name: str) -> str:
    return name.partition("@")[0].rpartition("-")[2]


def method_of(name: str) -> str:
    """Without the format: ``taqdit@300`` of ``taqdit-w4a8@300``."""
    recipe, at, iterations = name.partition("@")
    return recipe.rpartition("-")[0] + at + iterations


def cell(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['psnr_db']:.2f} ({figures['accuracy']:.1%})"


def matrix(figures: dict[str, dict[str, Any]]) -> str:
    """PSNR and accuracy, a line a method, the best at W4A8 first; bits and seconds are of W4A8, or of the first format
    that is there.
    """
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in figures.items():
        by_method.setdefault(method_of(name), {})[format_of(name)] = row
    titles = ["method", *(form.upper() for form in FORMATS), "bits a weight", "CPU seconds"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for method, found in sorted(by_method.items(), key=lambda item: -item[1].get("w4a8", {"psnr_db": 0.0})["psnr_db"]):
        usual = found.get("w4a8", next(iter(found.values())))
        cells = [cell(found.get(form)) for form in FORMATS]
        size = f"{usual['bits_per_weight']:.2f} | {usual['seconds_quantize']:.0f}"
        lines.append(f"| `{method}` | {' | '.join(cells)} | {size} |")
    return "\n".join(lines)


def paired(figures: dict[str, dict[str, Any]]) -> str:
    """A line a row, format by format, the best first."""
    titles = "| recipe | PSNR dB | 95 % | against gptq | accuracy | bits a weight | activation bits | CPU seconds |"
    lines = [titles, "|---|---|---|---|---|---|---|---|"]
    for form in FORMATS:
        rows = [(name, row) for name, row in figures.items() if format_of(name) == form]
        lines += [line(name, row) for name, row in sorted(rows, key=lambda item: -item[1]["psnr_db"])]
    return "\n".join(lines)


def line(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["psnr_95"]
    gain = ""
    if "gain_db" in figures:
        gain = f"{figures['gain_db']:+.2f} ({figures['gain_95'][0]:+.2f} to {figures['gain_95'][1]:+.2f})"
    return (
        f"| `{name}` | {figures['psnr_db']:.2f} | {low:.1f} to {high:.1f} | {gain} | {figures['accuracy']:.1%} "
        f"| {figures['bits_per_weight']:.2f} | {figures['activation_bits']:.1f} | {figures['seconds_quantize']:.0f} |"
    )


@click.command(help=__doc__)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--row", "names", multiple=True, help="Only these rows, such as qronos-w3a8; any recipe will do.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(num_prompts: int, names: tuple[str, ...], table: bool, work: Path) -> None:
    pictures = Pictures(num_prompts)
    kept = Rows(work, **pictures.of)
    wanted = list(names) or (list(kept.figures()) if table else rows())
    for name in wanted:
        kept.kept(name, partial(measure, pictures, name))
    figures = summaries(wanted, kept.figures())
    say(paired(figures))
    say("\n" + matrix(figures))
    exact = {"accuracy": pictures.accuracy(pictures.reference)["mean"]}
    result({"num_prompts": num_prompts, "full_precision": exact, "platform": platform.platform(), "rows": figures})


if __name__ == "__main__":
    main()
