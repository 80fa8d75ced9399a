"""``mlxquant demo``: the embedded model quantized three ways, and one picture that shows it. No download."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .api import jobs
from .api.loading import load
from .api.quantizing import calibrate, compare
from .commandline.console import Command, peak_bytes, progress, result, say
from .commandline.options import COUNT, PATH, force_option, option, seed_option, verbose_option
from .files.atomic import atomic_folder
from .files.checked import write_json
from .recipes.grammar import parse_recipe
from .report.comparison import Comparison

MODEL = "mmdit-shapes"
RECIPES = ("rtn-w4a16", "fast-w4a16", "good-w4a16")


@click.command("demo", cls=Command)
@option("--out", type=PATH, default="mlxquant-demo", help="Folder for pictures, report and models.")
@seed_option("Shifts the noise seeds of calibration and evaluation.")
@option("--num-prompts", default=32, type=COUNT, help="Held-out prompts to draw and measure.")
@option("--steps", type=COUNT, help="Sampler steps, of the calibration too.  [default: the model's, 28]")
@force_option
@verbose_option
def command(out: Path, seed: int, num_prompts: int, steps: int | None, force: bool) -> None:
    """Quantize the embedded model and compare.

    To weights of 4 bits by rounding, as "fast-w4a16" and as "good-w4a16", all of the same bytes; the pictures show what
    each costs.
    """
    start = time.perf_counter()
    model = load(MODEL)
    adapter = model.diffusion
    recipes = [parse_recipe(name) for name in RECIPES]
    with jobs.work_folder(out, force) as work:
        prompts = adapter.prompts("calibration", 16, seed)
        calib = calibrate(model, prompts, steps, progress=progress, work=work)
        done = {recipe.name: jobs.quantized(model, calib, recipe, work, progress) for recipe in recipes}
        models = {name: d.model for name, d in done.items()}
        comparison = compare(
            model, models, adapter.prompts("evaluation", num_prompts, seed), steps=steps, progress=progress
        )
        report = {
            "model": MODEL,
            "seed": seed,
            "prompts": num_prompts,
            "fp": {"accuracy": comparison.accuracy["FP"]["mean"]},
            "recipes": {name: figures(d, comparison) for name, d in done.items()},
        }
        with atomic_folder(out, force) as temporary:
            comparison.save(temporary / "comparison.png")
            for name, quantized in models.items():
                quantized.save(temporary / name)
            write_json(temporary / "report.json", "demo-report", {**report, "attributes": comparison.accuracy})
    say_table(report)
    say(f"{out / 'comparison.png'}")
    seconds = time.perf_counter() - start
    result(
        {
            **report,
            "out": str(out),
            "comparison": str(out / "comparison.png"),
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
        }
    )


def figures(done: jobs.TimedModel, comparison: Comparison) -> dict[str, float | None]:
    """One recipe's row of the report."""
    name, size = done.model.facts["recipe"]["name"], done.model.size
    return {
        "psnr_db": float(comparison.psnr_db[name].mean()),
        "accuracy": comparison.accuracy[name]["mean"],
        "bits_per_weight": size.bits_per_weight,
        "bits_per_quantized_weight": size.bits_per_quantized_weight,
        "model_bytes": size.model_bytes,
        "seconds_quantize": done.seconds,
    }


def say_table(report: dict[str, Any]) -> None:
    width = 2 + max(map(len, report["recipes"]))
    say(f"{'recipe':<{width}}{'PSNR dB':>9}{'accuracy':>10}{'bits/weight':>13}{'MB':>7}{'seconds':>9}")
    say(f"{'FP':<{width}}{'':>9}{report['fp']['accuracy']:>10.1%}")
    for name, row in report["recipes"].items():
        quality = f"{row['psnr_db']:>9.2f}{row['accuracy']:>10.1%}"
        say(
            f"{name:<{width}}{quality}{row['bits_per_weight']:>13.2f}{row['model_bytes'] / 1e6:>7.2f}"
            f"{row['seconds_quantize']:>9.1f}"
        )


if __name__ == "__main__":
    command()
