"""``mlxquant demo``: the embedded model quantized two ways and one picture that shows it. No download, any machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from . import api, artifacts, jobs
from .console import Command, peak_bytes, progress, result, say, verbose_option
from .recipe import parse_recipe

MODEL = "mmdit-shapes"
RECIPES = ("rtn-w4a8", "gptq-w4a8")


@click.command("demo", cls=Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="mlxquant-demo",
    show_default=True,
    help="Folder for pictures, report and models.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Shifts the noise seeds of calibration and evaluation.")
@click.option("--num-prompts", default=32, show_default=True, type=click.IntRange(1), help="Held-out prompts to draw and measure.")
@click.option("--steps", type=click.IntRange(1), help="Sampler steps, of the calibration too.  [default: the model's, 28]")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@verbose_option
def command(out: Path, seed: int, num_prompts: int, steps: int | None, force: bool) -> None:
    """Quantize the embedded model to W4A8, rounded and calibrated, and compare the pictures."""
    start = time.perf_counter()
    model = api.load(MODEL)
    adapter = model.adapter
    recipes = [parse_recipe(name) for name in RECIPES]
    work = jobs.prepare(out, force)
    calib = jobs.calibrated(model, adapter.prompts("calibration", 16, seed), steps or adapter.steps, adapter.cfg, work, progress)
    done = {recipe.name: jobs.quantized(model, calib, recipe, work, progress) for recipe in recipes}
    evaluation = adapter.prompts("evaluation", num_prompts, seed)
    comparison = api.compare(model, {name: d.model for name, d in done.items()}, evaluation, steps=steps, progress=progress)
    table = {}
    for name, d in done.items():
        size = d.model.size
        table[name] = {
            "psnr_db": float(comparison.psnr_db[name].mean()),
            "accuracy": comparison.accuracy[name]["mean"],
            "bits_per_weight": size.bits_per_weight,
            "bits_per_quantized_weight": size.bits_per_quantized_weight,
            "model_bytes": size.model_bytes,
            "seconds_quantize": d.seconds,
        }
    report = {
        "model": MODEL,
        "seed": seed,
        "prompts": num_prompts,
        "fp": {"accuracy": comparison.accuracy["FP"]["mean"]},
        "recipes": table,
    }
    with artifacts.atomic_folder(out, force) as temporary:
        comparison.save(temporary / "comparison.png")
        for name, d in done.items():
            d.model.save(temporary / name)
        artifacts.write_json(temporary / "report.json", "demo-report", {**report, "attributes": comparison.accuracy})
    artifacts.remove_folder(work)
    say(f"{'recipe':<12}{'PSNR dB':>9}{'accuracy':>10}{'bits/weight':>13}{'MB':>7}{'seconds':>9}")
    say(f"{'FP':<12}{'':>9}{comparison.accuracy['FP']['mean']:>10.1%}")
    for name, row in table.items():
        figures = f"{row['psnr_db']:>9.2f}{row['accuracy']:>10.1%}{row['bits_per_weight']:>13.2f}{row['model_bytes'] / 1e6:>7.2f}"
        say(f"{name:<12}{figures}{row['seconds_quantize']:>9.1f}")
    say(f"{out / 'comparison.png'}")
    seconds = time.perf_counter() - start
    result({**report, "out": str(out), "comparison": str(out / "comparison.png"), "seconds": seconds, "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    command()
