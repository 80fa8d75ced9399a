"""What each part of the TaQ-DiT pipeline is worth on pictures: ``python benchmarks/taqdit.py --work WORK``.

On ``mmdit-shapes`` and its held-out prompts, hard-rounded weights, PSNR of the decoded picture against full precision
at the same seed (mean and paired bootstrap 95 % interval) and attribute accuracy. Three parts: weights and activations
together (``rows``), one ingredient changed at a time (``ablations``), and PSNR over mean activation width for both tier
rules with full-precision weights (``frontier``). Rows that are in ``WORK.jsonl`` already are not computed again, and
two processes may share it with different ``--part`` or ``--row``. Tables go to stderr as Markdown; the last line of
stdout is one JSON object. It also draws the frontier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS
from mlxquant.api.model import Model
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import progress, result, say
from mlxquant.files.atomic import atomic_file
from mlxquant.grids.reading import TableReader
from mlxquant.layers.tree import set_module
from mlxquant.pipeline.activation_stats import ActivationStats
from mlxquant.pipeline.decisions import decide
from mlxquant.pipeline.replay import collect
from mlxquant.pipeline.samples import Samples, draw, open_folder
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.recipe import Recipe
from mlxquant.sweep.inputs import Options
from pictures import Pictures, machine, mean_psnr
from rows import Rows
from shapes_ladder import QuantizedInput, without_tables

CALIBRATION = 16  # prompts
WEIGHTS = [f"{method}-w{bits}a16" for bits in (4, 3) for method in ("rtn", "gptq", "adaround", "taqdit")]
TOGETHER = ["rtn-w4a8", "gptq-w4a8", "taqdit-w4a8", "taqdit-w4a8:weights"]
THRESHOLDS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.1)
BUDGETS = (3e-5, 1e-5, 3e-6, 1e-6, 6.5e-7, 3e-7, 3e-8)


def learning(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, learning=replace(recipe.learning, **changes))


def layers(recipe: Recipe, **changes: Any) -> Recipe:
    """With changes to the specification of the layers that are reconstructed."""
    rules = [(p, replace(s, **changes) if s is not None and s.reconstruct else s) for p, s in recipe.rules]
    return replace(recipe, rules=tuple(rules))


def inputs(recipe: Recipe, **changes: Any) -> Recipe:
    """With changes to how activations are quantized."""
    rules = [
        (p, replace(s, activation=replace(s.activation, **changes)) if s is not None and s.activation else s)
        for p, s in recipe.rules
    ]
    return replace(recipe, rules=tuple(rules))


ABLATIONS: dict[str, tuple[str, Callable[[Recipe], Recipe], int]] = {
    "taqdit-w4a16": ("taqdit-w4a16", lambda r: r, CALIBRATION),
    "started from nearest": ("taqdit-w4a16", lambda r: layers(r, rounding="rtn"), CALIBRATION),
    "started from the corrected target": ("taqdit-w4a16", lambda r: layers(r, corrected=True), CALIBRATION),
    "errors not weighed by sensitivity": ("taqdit-w4a16", lambda r: replace(r, sensitivity=False), CALIBRATION),
    "sensitivity without learning": ("taqdit-w4a16", lambda r: layers(r, reconstruct=None), CALIBRATION),
    "a tenth of the regulariser": (
        "taqdit-w4a16",
        lambda r: learning(r, pressure=r.learning.pressure / 10),
        CALIBRATION,
    ),
    "300 iterations": ("taqdit-w4a16", lambda r: learning(r, iterations=300), CALIBRATION),
    "64 calibration prompts": ("taqdit-w4a16", lambda r: r, 64),
    "gptq-w4a16, 64 calibration prompts": ("gptq-w4a16", lambda r: r, 64),
    "taqdit-w4a8": ("taqdit-w4a8", lambda r: r, CALIBRATION),
    "taqdit-w4a8, 64 calibration prompts": ("taqdit-w4a8", lambda r: r, 64),
    "QDrop 0.5": ("taqdit-w4a8", lambda r: learning(r, drop=0.5), CALIBRATION),
    "all inputs 8 bits": ("taqdit-w4a8", lambda r: inputs(r, budget=None, shift=False), CALIBRATION),
    "one step for all timesteps, 8 bits": (
        "taqdit-w4a8",
        lambda r: inputs(r, budget=None, shift=False, per_timestep=False),
        CALIBRATION,
    ),
}


def built(name: str, model: Model, calib: Callable[[int], Calibration]) -> tuple[Model, dict[str, Any]]:
    """The model of a row and what there is to say about how it was made."""
    if name in ABLATIONS:
        recipe_name, change, prompts = ABLATIONS[name]
        recipe = change(parse_recipe(recipe_name))
    else:
        recipe, prompts = parse_recipe(name), CALIBRATION
    start = time.perf_counter()
    done = mq.quantize(model, calib(prompts), recipe, progress=progress)
    learned = [stage for stage in done.facts["stages"] if "learning" in stage]
    widths = [float(np.mean(layer.table.bits)) for layer in done.layers.values() if layer.table is not None]
    facts = {
        "seconds_quantize": time.perf_counter() - start,
        "win_rate": sum(s["kept"] == "learned" for s in learned) / len(learned) if learned else None,
        "flipped": float(np.mean([s["learning"]["flipped"] for s in learned])) if learned else None,
        "activation_bits": float(np.mean(widths)) if widths else 16.0,
    }
    return done, facts


class Bench:
    """Pictures of the reference, and what was measured of others, kept as rows."""

    def __init__(self, num_prompts: int, work: Path):
        self.pictures = Pictures(num_prompts)
        self.rows = Rows(work, **self.pictures.of)

    def measured(self, other: Model) -> dict[str, Any]:
        decibels, accuracy = self.pictures.scores(other)
        return {**mean_psnr(decibels), "accuracy": accuracy["mean"]}

    def row(self, name: str) -> dict[str, Any]:
        if name == "taqdit-w4a8:weights":  # V1: the same weights with full-precision activations
            self.row("taqdit-w4a8")
        return self.rows.kept(name, lambda: self._plain(name))

    def _plain(self, name: str) -> dict[str, Any]:
        other, facts = built(name, self.pictures.model, self.pictures.calibration)
        row = {**self.measured(other), **facts}
        if name == "taqdit-w4a8":
            self.rows.kept(
                "taqdit-w4a8:weights",
                lambda: {**self.measured(without_tables(other)), **facts, "activation_bits": 16.0},
            )
        return row

    def frontier(self) -> dict[str, list[dict[str, float]]]:
        """Points of mean width and PSNR for both rules, activations alone."""
        folder = self.rows.folder() / "calibration"
        adapter = self.pictures.model.adapter
        if not (folder / "activations" / "layer_statistics.json").exists():
            prompts = adapter.prompts("calibration", CALIBRATION)
            draw(adapter, open_folder(adapter, prompts, adapter.steps, adapter.cfg, 0, folder), progress)
        stats = collect(adapter, Samples.read(folder), CALIBRATION, 1, 32, 0, folder / "activations", progress=progress)
        points = {
            "threshold": [Options(rule="threshold", thresholds=(6 * f, 10 * f)) for f in THRESHOLDS],
            "error": [Options(budget=b) for b in BUDGETS],
        }
        return {rule: [self._point(stats, options) for options in some] for rule, some in points.items()}

    def _point(self, stats: ActivationStats, options: Options) -> dict[str, float]:
        setting = options.thresholds[0] if options.rule == "threshold" else options.budget

        def make() -> dict[str, Any]:
            model = self.pictures.model
            config = decide(stats, model.adapter, options, progress)
            adapter = model.clone()
            linears = adapter.layers()
            for path, table in config.plain.items():
                set_module(adapter.module, path, QuantizedInput(linears[path], TableReader(table, adapter.clock)))
            return {"setting": setting, "bits": config.mean_bits, **self.measured(Model(adapter))}

        return self.rows.kept(f"frontier-{options.rule}-{setting:g}", make)


def say_rows(rows: dict[str, dict[str, Any]]) -> None:
    say("\n| row | PSNR dB | 95 % | accuracy | activation bits | flipped | seconds |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        span = "{:.1f} to {:.1f}".format(*row["psnr_95"])
        flipped = "" if row["flipped"] is None else f"{row['flipped']:.1%}"
        figures = f"{row['psnr_db']:.2f} | {span} | {row['accuracy']:.1%} | {row['activation_bits']:.2f} | {flipped}"
        say(f"| {name} | {figures} | {row['seconds_quantize']:.0f} |")


def say_frontier(frontier: dict[str, list[dict[str, float]]]) -> None:
    say("\n| rule | setting | mean activation bits | PSNR dB |\n|---|---|---|---|")
    for rule, points in frontier.items():
        for point in points:
            say(f"| {rule} | {point['setting']:g} | {point['bits']:.2f} | {point['psnr_db']:.2f} |")


def gap(frontier: dict[str, list[dict[str, float]]]) -> list[dict[str, float]]:
    """How far the error rule's line lies above each point of the threshold rule that it spans."""
    line = sorted((p["bits"], p["psnr_db"]) for p in frontier["error"])
    widths, heights = zip(*line, strict=True)
    inside = [p for p in frontier["threshold"] if widths[0] <= p["bits"] <= widths[-1]]
    return [{"bits": p["bits"], "gap_db": float(np.interp(p["bits"], widths, heights) - p["psnr_db"])} for p in inside]


def draw_frontier(frontier: dict[str, list[dict[str, float]]], path: Path) -> None:
    """PSNR over mean activation width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for rule, marker, colour in (("error", "o", "#1f6f8b"), ("threshold", "s", "#c05621")):
        points = sorted((p["bits"], p["psnr_db"]) for p in frontier[rule])
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=f"--rule {rule}")
    axes.set(xlabel="mean activation width, bits", ylabel="PSNR against full precision, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@click.command()
@click.option("--num-prompts", default=32, show_default=True)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(["rows", "ablations", "frontier"]), help="[default: all]"
)
@click.option("--row", "names", multiple=True, help="Only these rows or ablations.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default="taqdit-benchmark",
    show_default=True,
    help="Rows are kept in WORK.jsonl.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Where to draw the frontier.")
def main(num_prompts: int, parts: tuple[str, ...], names: tuple[str, ...], work: Path, plot: Path | None) -> None:
    bench = Bench(num_prompts, work)
    parts = parts or ("rows", "ablations", "frontier")
    facts: dict[str, Any] = {}
    for part, known in (("rows", WEIGHTS + TOGETHER), ("ablations", list(ABLATIONS))):
        if part in parts:
            facts[part] = {name: bench.row(name) for name in known if not names or name in names}
            say_rows(facts[part])
    if "frontier" in parts and not names:
        facts["frontier"] = bench.frontier()
        facts["gap"] = gap(facts["frontier"])
        say_frontier(facts["frontier"])
        if plot is not None:
            draw_frontier(facts["frontier"], plot)
    result({"prompts": num_prompts, "calibration_prompts": CALIBRATION, "machine": machine(), **facts})


if __name__ == "__main__":
    main()
