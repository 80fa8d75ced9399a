"""Which method is best, and at what: ``python benchmarks/which_method.py --work FOLDER``.

Every method at six formats on ``mmdit-shapes``: PSNR of the decoded picture against full precision at the same seed on
held-out prompts (mean and bootstrap 95 % interval), the paired difference to ``gptq`` in the same format with its
interval, attribute accuracy, stored bits a weight of the whole model, and CPU seconds to quantize. Calibration is the
same for all: 16 prompts, 28 steps. Rows that are in ``--work`` already are not computed again, so several processes may
share it; those behind the README are in ``benchmarks/results/which_method``. ``--table`` prints what is there. After
the rows comes one table of PSNR and accuracy, methods by formats. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import platform
import time
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
from mlxquant.metrics.psnr import psnr
from taqdit import CALIBRATION, Bench

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


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """A recipe, perhaps with ``@N``: N iterations where it learns."""
    recipe_name, _, iterations = name.partition("@")
    recipe = mq.parse_recipe(recipe_name)
    if iterations:
        recipe = replace(recipe, learning=replace(recipe.learning, iterations=int(iterations)))
    calib = bench.calibration(CALIBRATION)
    start = time.process_time()
    done = mq.quantize(bench.model, calib, recipe, progress=progress)
    seconds = time.process_time() - start
    images = done.images(bench.prompts, progress=progress)
    stages = [s for s in done.facts["stages"] if "errors" in s]
    transforms = [kept["kept"] for s in stages for kept in s.get("transforms", {}).values()]
    widths = [float(np.mean(layer.table.bits)) for layer in done.layers.values() if layer.table is not None]
    return {
        "psnr_each": psnr(images, bench.reference).tolist(),
        "accuracy": accuracy(bench, images),
        "bits_per_weight": done.size.bits_per_weight,
        "activation_bits": float(np.mean(widths)) if widths else 16.0,
        "seconds_quantize": seconds,
        "kept": [s["kept"] for s in stages],
        "transforms_kept": f"{sum(transforms)} of {len(transforms)}" if transforms else "",
    }


def accuracy(bench: Bench, images: np.ndarray) -> float:
    return bench.model.adapter.attributes(images, [p.text for p in bench.prompts])["mean"]


def summary(bench: Bench, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, with the paired difference to gptq in the same format where that is there."""
    each = np.array(row["psnr_each"])
    figures = {
        key: row[key]
        for key in ("accuracy", "bits_per_weight", "activation_bits", "seconds_quantize", "transforms_kept")
    }
    figures |= {"psnr_db": float(each.mean()), "psnr_95": interval(each)}
    base = bench.path(f"gptq-{format_of(name)}")
    if base.exists():
        gain = each - np.array(json.loads(base.read_text())["psnr_each"])
        figures |= {"gain_db": float(gain.mean()), "gain_95": interval(gain)}
    return figures


def format_of(name: str) -> str:
    return name.partition("@")[0].rpartition("-")[2]


def method_of(name: str) -> str:
    """Without the format: ``taqdit@300`` of ``taqdit-w4a8@300``."""
    recipe, at, iterations = name.partition("@")
    return recipe.rpartition("-")[0] + at + iterations


def cell(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['psnr_db']:.2f} ({figures['accuracy']:.1%})"


def say_matrix(figures: dict[str, dict[str, Any]]) -> None:
    """PSNR and accuracy, a line a method, the best at W4A8 first; bits and seconds are of W4A8, or of the first format
    that is there.
    """
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in figures.items():
        by_method.setdefault(method_of(name), {})[format_of(name)] = row
    titles = ["method", *(form.upper() for form in FORMATS), "bits a weight", "CPU seconds"]
    say(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for method, found in sorted(by_method.items(), key=lambda item: -item[1].get("w4a8", {"psnr_db": 0.0})["psnr_db"]):
        usual = found.get("w4a8", next(iter(found.values())))
        cells = [cell(found.get(form)) for form in FORMATS]
        say(f"| `{method}` | {' | '.join(cells)} | {usual['bits_per_weight']:.2f} | {usual['seconds_quantize']:.0f} |")


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
@click.option("--table", is_flag=True, help="Print the rows that are in the folder, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder that keeps finished rows.")
def main(num_prompts: int, names: tuple[str, ...], table: bool, work: Path) -> None:
    bench = Bench(num_prompts, work)
    wanted = list(names) or (
        sorted(path.stem.replace(".", "+") for path in bench.work.glob("*.json")) if table else rows()
    )
    found = {name: bench.kept(name, partial(measure, bench, name)) for name in wanted}
    figures = {name: summary(bench, name, row) for name, row in found.items()}
    say(
        "| recipe | PSNR dB | 95 % | against gptq | accuracy | bits a weight | activation bits | CPU seconds |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for form in FORMATS:
        for name in sorted((n for n in wanted if format_of(n) == form), key=lambda n: -figures[n]["psnr_db"]):
            say(line(name, figures[name]))
    say_matrix(figures)
    exact = {"accuracy": accuracy(bench, bench.reference)}
    result({"num_prompts": num_prompts, "full_precision": exact, "platform": platform.platform(), "rows": figures})


if __name__ == "__main__":
    main()
