"""What tuned scales are worth: ``python benchmarks/tuned_scales.py --work WORK``.

Recipes on ``mmdit-shapes`` as they are and with ``+tuned``, from the same 16 calibration prompts: PSNR of 64 held-out
pictures that no choice was made on (prompts 64 to 127 of the evaluation set, or as ``--first`` and ``--count`` say)
against full precision, the paired gain, stored bits a weight, the held-out loss of the tuning and CPU seconds.
``--text`` measures ``gpt-python`` in the place of that: bits a character above full precision on held-out text.

All is kept in WORK, so a run that is killed goes on, and rows that are there are not computed again. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
from mlxquant.commandline.console import Command, progress, result, say
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.psnr import psnr
from mlxquant.recipes.recipe import Recipe

CALIBRATION = 16
PICTURES = (
    "gptq-w4a16",
    "gptq-w4a16-g64",
    "gptq-w2a16-g64",
    "mixed-w4a16",
    "gptq+smoothquant+rotation+mixed-w4a8",
)
TEXTS = ("gptq-w4a16", "gptq-w2a16-g64")


def tuned(name: str, ingredient: str, settings: dict[str, Any]) -> Recipe:
    """A recipe with one more ingredient, and other settings of it."""
    method, dash, spec = name.rpartition("-w")
    recipe = mq.parse_recipe(f"{method}+{ingredient}{dash}{spec}")
    assert recipe.tuning is not None
    return replace(recipe, tuning=replace(recipe.tuning, **settings))


def quantized(model: Any, calib: Any, recipe: Recipe, work: Path) -> tuple[Any, float]:
    """The model and the CPU seconds of this run."""
    start = time.process_time()
    done = mq.quantize(model, calib, recipe, work=work, progress=progress)
    return done, time.process_time() - start


def measured(
    kind: str, names: tuple[str, ...], work: Path, ingredient: str, settings: dict[str, Any], judge: Any
) -> None:
    """A line in ``WORK/rows.jsonl`` for each recipe, as it is and tuned."""
    rows = work / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    for name in names:
        for recipe in (mq.parse_recipe(name), tuned(name, ingredient, settings)):
            told = {"kind": kind, "recipe": recipe.name, **(settings if recipe.tuning else {})}
            if any(told.items() <= one.items() for one in known):
                continue
            folder = work / (
                recipe.name + "".join(f"-{key}-{value}" for key, value in settings.items() if recipe.tuning)
            )
            row, seconds = judge(recipe, folder)
            row = {**told, **row, "seconds": round(seconds, 1)}
            say(json.dumps(row))
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


@click.command(cls=Command)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", "recipes", multiple=True, help="Other recipes, without 'tuned'.")
@click.option("--ingredient", default="tuned", help="Such as tuned64.")
@click.option("--first", default=64)
@click.option("--count", default=64)
@click.option("--iterations", type=int)
@click.option("--on-policy", is_flag=True)
@click.option("--text", is_flag=True)
def command(
    work: Path,
    recipes: tuple[str, ...],
    ingredient: str,
    first: int,
    count: int,
    iterations: int | None,
    on_policy: bool,
    text: bool,
) -> None:
    """What tuned scales are worth."""
    work.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {} if iterations is None else {"iterations": iterations}
    settings |= {"on_policy": True} if on_policy else {}
    if text:
        model = mq.load("gpt-python")
        calib: Any = mq.calibrate_text(model)
        exact = model.predict().bits_per_character

        def judge(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], float]:
            done, seconds = quantized(model, calib, recipe, folder)
            lost = done.predict().bits_per_character - exact
            return {"bits": done.size.bits_per_weight, "lost": lost, "tuning": done.facts.get("tuning")}, seconds

        measured("text", recipes or TEXTS, work, ingredient, settings, judge)
    else:
        model = mq.load("mmdit-shapes")
        calib = mq.calibrate(model, CALIBRATION, work=work / "calibration", progress=progress)
        prompts = model.diffusion.prompts("evaluation", first + count)[first:]
        wanted = model.images(prompts, progress=progress)

        def judge(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], float]:
            done, seconds = quantized(model, calib, recipe, folder)
            found = psnr(done.images(prompts, progress=progress), wanted)
            low, high = interval(found)
            row = {"bits": done.size.bits_per_weight, "psnr": float(np.mean(found)), "low": low, "high": high}
            return {**row, "prompts": [first, count], "tuning": done.facts.get("tuning")}, seconds

        measured("pictures", recipes or PICTURES, work, ingredient, settings, judge)
    result({"rows": [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]})


if __name__ == "__main__":
    command()
