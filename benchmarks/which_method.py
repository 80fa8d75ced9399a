"""Which method is best, and at what: ``python benchmarks/which_method.py --work WORK``.

Recipes on ``mmdit-shapes``: PSNR of the decoded picture against full precision at the same seed, the paired difference
to ``gptq`` in the same format, the share of attributes that pictures obey, and stored bits a weight of the whole model.
Rows have the CPU seconds to quantize, too; tables do not, since several rows may be measured side by side.

What is reported is separate from what was chosen: methods and defaults were chosen on held-out prompts 0 to 63, and
figures are of prompts 64 to 127, which no choice has seen. Every recipe is calibrated three times, each time on 16
other prompts with other seeds, and intervals are over draws of the calibration and prompts together (``draws.py``).
Recipes that learn, codes, scales or networks over time, have one draw, and an interval that knows nothing of others. A
difference whose interval holds zero is a tie.

Rows that are in ``WORK.jsonl`` already are not computed again, so several processes may share it; those behind the docs
are in ``benchmarks/results/which_method.jsonl``. ``@N`` behind a recipe stands for N iterations of learning. The last
line of stdout is one JSON object.
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
import recipe_tables
from mlxquant.commandline.console import progress, result, say
from mlxquant.metrics.attributes import shares
from pictures import Pictures
from recipe_tables import Figures, bits, by_recipe, compared, format_of, gain, quality
from rows import Rows

CALIBRATION = 16  # prompts a draw
FIRST, COUNT = 64, 64  # of the held-out prompts; those before FIRST are for choices
DRAWS = 3
EXACT = "full precision"
LEARNED = ("+tdq", "+logsnr", "+tuned", "@")
ROWS = {
    "w8a8": "rtn gptq gptq+smoothquant+rotation",
    "w4a16": "rtn gptq gptq+regrid qronos kron mixed kron+mixed kron+mixed+tuned gptq+smoothquant+rotation+mixed",
    "w4a16-g64": "rtn gptq",
    "w4a8": """rtn gptq qronos quarot gptq+smoothquant gptq+smoothquant+rotation mixed
        gptq+smoothquant+rotation+mixed kron+smoothquant+rotation kron+smoothquant+rotation+mixed
        kron+smoothquant+rotation+mixed+tuned gptq+svd8 svdquant adaround@300 tcaqdm@300 taqdit@300""",
    "w4a8-g64-token": "rtn gptq kron+smoothquant+rotation",
    "w4a4": "rtn gptq gptq+tdq gptq+logsnr gptq+smoothquant+rotation+mixed gptq+smoothquant+rotation+logsnr+mixed",
    "w3a16": "rtn gptq gptq+regrid kron kron+mixed kron+mixed+tuned",
    "w3a8": "rtn gptq gptq+smoothquant+rotation+mixed",
    "w2a16-g64": "rtn gptq gptq+regrid kron kron+mixed kron+mixed+tuned",
    "w2a16": "rtn gptq descent+refit descent+refit+corrected+rotation",
}


MEANS = ("bits_per_weight", "activation_bits", "seconds_quantize")
TITLES = ("bits a weight", "PSNR dB (95 %)", "against gptq (95 %)", "accuracy", "input bits")


def rows() -> list[str]:
    """What is measured, format by format."""
    parts = [(form, *method.partition("@")) for form, methods in ROWS.items() for method in methods.split()]
    return [f"{method}-{form}{at}{iterations}" for form, method, at, iterations in parts]


def draws_of(name: str) -> int:
    """How many draws a recipe is worth the time of."""
    return 1 if any(learned in name for learned in LEARNED) else DRAWS


class Bench:
    """The pictures, and the rows of every draw.

    Args:
        work: What ``--work`` says.
        first: The first held-out prompt.
        count: How many.
    """

    def __init__(self, work: Path, first: int = FIRST, count: int = COUNT):
        self.work, self.pictures = work, Pictures(count, first)

    def kept(self, draw: int) -> Rows:
        return Rows(self.work, **self.pictures.of, draw=draw)

    def measure(self, name: str, count: int) -> None:
        """Keep the rows of a recipe for ``count`` draws."""
        self.kept(0).kept(EXACT, lambda: marks(self.pictures, self.pictures.reference))
        for draw in range(count):
            self.kept(draw).kept(name, partial(measure, self.pictures, name, draw))


def measure(pictures: Pictures, name: str, draw: int) -> dict[str, Any]:
    """A recipe, perhaps with ``@N``: N iterations where it learns."""
    recipe_name, _, iterations = name.partition("@")
    recipe = mq.parse_recipe(recipe_name)
    if iterations:
        recipe = replace(recipe, learning=replace(recipe.learning, iterations=int(iterations)))
    calib = pictures.calibration(CALIBRATION, draw * CALIBRATION)
    start = time.process_time()
    done = mq.quantize(pictures.model, calib, recipe, progress=progress)
    seconds = time.process_time() - start
    images = done.images(pictures.prompts, progress=progress)
    stages = [s for s in done.facts["stages"] if "errors" in s]
    transforms = [kept["kept"] for s in stages for kept in s.get("transforms", {}).values()]
    widths = [float(np.mean(layer.table.bits)) for layer in done.layers.values() if layer.table is not None]
    return {
        "psnr_each": pictures.psnr(images).tolist(),
        **marks(pictures, images),
        "bits_per_weight": done.size.bits_per_weight,
        "activation_bits": float(np.mean(widths)) if widths else 16.0,
        "seconds_quantize": seconds,
        "kept": [s["kept"] for s in stages],
        "transforms_kept": f"{sum(transforms)} of {len(transforms)}" if transforms else "",
    }


def marks(pictures: Pictures, images: np.ndarray) -> dict[str, Any]:
    """How many attributes each prompt asks for, and how many its picture obeys."""
    share, asked = shares(pictures.marks(images))
    return {"asked": asked, "obeyed": [round(a * b) for a, b in zip(share, asked, strict=True)]}


def measured(file: Path) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """The rows of a file by recipe, one a draw, and the accuracy in full precision.

    Raises:
        click.ClickException: Rows of several models or prompts, or no row in full precision.
    """
    found = by_recipe(file, "prompts")
    if EXACT not in found:
        raise click.ClickException(f"{file}: no row {EXACT!r}; measure any recipe into it")
    return found, accuracy(found.pop(EXACT))


def summary(rows: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> Figures:
    """The figures of a recipe, a row a draw, with the difference to ``base`` on the draws that both have."""
    return compared(rows, base, MEANS) | {"accuracy": accuracy(rows)}


def accuracy(rows: Iterable[dict[str, Any]]) -> float:
    """The share of all attributes in all draws."""
    counts = np.array([[row["obeyed"], row["asked"]] for row in rows]).sum((0, 2))
    return float(counts[0] / counts[1])


def summaries(found: dict[str, list[dict[str, Any]]]) -> dict[str, Figures]:
    return {name: summary(rows, found.get(f"gptq-{format_of(name)}")) for name, rows in found.items()}


def simulated(name: str) -> bool:
    """Whether a recipe's layers multiply in floating point what a format with integer inputs would have as integers:
    with groups, whose sums have to be scaled one by one, with steps that are found while the model runs, and in
    attention.
    """
    recipe = mq.parse_recipe(name.partition("@")[0])
    inputs = [(spec.weight, spec.activation) for _, spec in recipe.rules if spec.activation is not None]
    grouped = any(weight is not None and weight.group != "channel" for weight, _ in inputs)
    return recipe.probabilities is not None or grouped or any(table.range == "dynamic" for _, table in inputs)


def tables(figures: dict[str, Figures]) -> str:
    """Of all recipes, a table a format."""
    return recipe_tables.tables(figures, ROWS, TITLES, line)


def line(name: str, figures: Figures) -> str:
    against = gain(figures) if "gain_db" in figures and not is_base(name) else ""
    notes = ("†" if simulated(name) else "") + ("¹" if figures["draws"] == 1 else "")
    return (
        f"| `{name}`{notes} | {bits(figures):.2f} | {quality(figures)} | {against} | {figures['accuracy']:.1%} "
        f"| {figures['activation_bits']:.1f} |"
    )


@click.command(help=__doc__)
@click.option("--row", "names", multiple=True, help="Only these, such as qronos-w3a8; any recipe will do.")
@click.option("--draws", "count", type=click.IntRange(1), help="Draws of the calibration. [default: 3; 1 with @N]")
@click.option("--num-prompts", "prompts", type=click.IntRange(2), default=COUNT, show_default=True)
@click.option("--choose", is_flag=True, help="Measure on prompts from 0 on, which choices are made on.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(names: tuple[str, ...], count: int | None, prompts: int, choose: bool, table: bool, work: Path) -> None:
    bench = Bench(work, 0 if choose else FIRST, prompts)
    if not table:
        for name in names or rows():
            bench.measure(name, count or draws_of(name))
    found, exact = measured(bench.kept(0).file)
    figures = summaries({name: rows for name, rows in found.items() if not names or name in names or is_base(name)})
    say(tables(figures))
    result({"full_precision": exact, "platform": platform.platform(), "rows": figures})


def is_base(name: str) -> bool:
    return name.startswith("gptq-")


if __name__ == "__main__":
    main()
