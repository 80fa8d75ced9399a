"""``mlxquant evaluate``: what quantization does to pictures, size and speed, as a report that people look at."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .api import jobs
from .api.loading import load as load_model
from .api.model import Model
from .api.plan import plan
from .api.quantizing import calibrate
from .commandline.console import Command, peak_bytes, progress, result, say
from .commandline.options import (
    COUNT,
    MODEL_HELP,
    PATH,
    iters_option,
    models_option,
    negative_option,
    option,
    prompts_options,
    run_options,
    seed_option,
    size_option,
    together,
)
from .errors import AdapterError
from .evaluation.contender import Contender, distinct
from .evaluation.drawings import Drawings
from .evaluation.figures import Judge
from .evaluation.metric_options import chosen_metrics, metric_option, weights_option
from .evaluation.paired import FLOOR, Evaluation
from .evaluation.quantizing import quantized_contender
from .evaluation.report_folder import put, say_report, summarise, write_report
from .files.atomic import atomic_folder
from .recipes.grammar import parse_recipe
from .recipes.recipe import Recipe
from .sampling.picture_size import PictureSize, plain
from .sampling.prompts import Prompt, read_prompts

PROMPTS, CALIBRATION_PROMPTS = 64, 16


drawing_options = together(
    size_option,
    prompts_options("Prompts to draw, held out from calibration", 64),
    option("--steps", type=COUNT, help="Sampler steps, of the calibration too.  [default: the model's]"),
    option("--cfg-weight", type=click.FloatRange(0), help="Guidance, of the calibration too.  [default: the model's]"),
    negative_option,
    seed_option("Shifts the noise seeds of the model's own prompts."),
    metric_option,
    weights_option,
)


@click.command("evaluate", cls=Command)
@models_option(
    f"{MODEL_HELP} Or a folder that 'mlxquant quantize' wrote. The first is the reference; again for more to"
    " compare with it."
)
@option(
    "--recipe",
    "recipe_names",
    multiple=True,
    metavar="RECIPE",
    help="Quantize the first model by this recipe; again for more.",
)
@option("--calibration-prompts", type=PATH, help="A prompt file for the recipes.  [default: the model's own]")
@option("--num-calibration-prompts", type=COUNT, help="Its first N.  [default: all of the file, 16 of the model's own]")
@drawing_options
@option("--floor/--no-floor", default=True, help="Also draw the reference in float16: the least difference.")
@option("--samples", type=COUNT, help="As of 'mlxquant quantize'.")
@iters_option
@option("--out", type=PATH, required=True, help="Folder for the report.")
@run_options
def command(
    names: tuple[str, ...],
    recipe_names: tuple[str, ...],
    size: PictureSize | None,
    prompt_file: Path | None,
    num_prompts: int | None,
    steps: int | None,
    cfg_weight: float | None,
    negative: str | None,
    seed: int,
    asked: tuple[str, ...],
    weights: tuple[str, ...],
    calibration_prompts: Path | None,
    num_calibration_prompts: int | None,
    samples: int | None,
    iters: int | None,
    floor: bool,
    out: Path,
    force: bool,
    resume: bool,
) -> None:
    """Judge quantized models against a reference.

    All draw the same prompts and seeds. Recipes quantize the reference first. Writes report.html, report.json,
    report.csv, every picture, and the quantized models.
    """
    start = time.perf_counter()
    if len(names) + len(recipe_names) < 2:
        raise AdapterError(f"--model {names[0]} alone has nothing to be compared with; add --recipe, or --model again")
    metrics, places = chosen_metrics(asked, weights)
    recipes = [with_iterations(parse_recipe(name), iters) for name in dict.fromkeys(recipe_names)]
    models = load(names, size)
    adapter = models[0].diffusion
    for recipe in recipes:
        plan(models[0], recipe)
    steps, guidance = adapter.steps if steps is None else steps, adapter.guiding(cfg_weight, negative)
    for model in models[1:]:
        model.diffusion.guiding(guidance.weight, guidance.negative)  # refused now, if at all
    prompts = chosen(adapter, prompt_file, num_prompts, PROMPTS, "evaluation", seed)
    examples = []
    if recipes:
        examples = chosen(
            adapter, calibration_prompts, num_calibration_prompts, CALIBRATION_PROMPTS, "calibration", seed
        )
    judge = Judge(metrics, [prompt.text for prompt in prompts], adapter.attributes, places)
    loaded = [label(name, model) for name, model in zip(names, models, strict=True)]
    _, *labels = distinct([FLOOR, *loaded, *(recipe.name for recipe in recipes)])
    with jobs.work_folder(out, force, resume) as work:
        for model in models:
            model.adapter.check_finite()
        contenders = [
            Contender(*own, model, model.adapter.fingerprint) for own, model in zip(labels, models, strict=False)
        ]
        if recipes:
            calib = calibrate(
                models[0],
                examples,
                steps,
                guidance.weight,
                progress=progress,
                samples=samples,
                work=work,
                negative=negative,
            )
        for recipe, own in zip(recipes, labels[len(models) :], strict=True):
            contenders.append(quantized_contender(models[0], calib, recipe, own, work, progress))
        most = peak_bytes()  # now, for measuring the models' own peaks starts MLX's count over
        drawings = Drawings(work / "drawings", contenders[0], tuple(prompts), steps, guidance)
        how: dict[str, Any] = {"steps": steps, "cfg_weight": guidance.weight}
        if guidance.negative is not None:
            how["negative_prompt"] = guidance.negative
        settings: dict[str, Any] = {
            "model": adapter.name,
            **how,
            "size": plain(adapter.size),
            "seed": seed,
            "batch": adapter.batch,
            "calibration": {"prompts": len(examples), **how, "seed": seed} if recipes else None,
        }
        report, pictures = Evaluation(drawings, contenders[1:], judge, work, progress).report(settings, floor)
        with atomic_folder(out, force) as temporary:
            for one, facts in zip(contenders[1:], report["results"], strict=True):
                if facts["quantized"]:
                    put(work / "layers" / f"{one.folder}.json", temporary / "layers" / f"{one.folder}.json")
                if one.seconds is not None:
                    put(work / "models" / one.folder, temporary / "models" / one.folder)
            write_report(temporary, report, pictures, progress)
    say_report(report)
    say(f"{out / 'report.html'}")
    result(
        {
            **summarise(report),
            "out": str(out),
            "seconds": time.perf_counter() - start,
            "peak_bytes": max(most, peak_bytes()),
        }
    )


def load(names: tuple[str, ...], size: PictureSize | None) -> list[Model]:
    """The models, all drawing pictures of one size: that of the first, where none is asked for."""
    models = [load_model(name, size) for name in names]
    for name, model in zip(names, models, strict=True):
        if size is None and model.diffusion.latent_shape != models[0].diffusion.latent_shape:
            model.diffusion.resize(models[0].diffusion.size)
        if model.diffusion.latent_shape != models[0].diffusion.latent_shape:
            raise AdapterError(
                f"{name} draws latents of {model.diffusion.latent_shape}, {names[0]} of"
                f" {models[0].diffusion.latent_shape}; only models of one kind can be compared"
            )
    return models


def label(reference: str, model: Model) -> str:
    """What people call a model that was loaded: its folder's name, or its own."""
    return Path(reference).name or model.name


def chosen(adapter: Any, file: Path | None, count: int | None, default: int, purpose: str, seed: int) -> list[Prompt]:
    """The first ``count`` prompts of a file, or of the model's own."""
    return read_prompts(file)[:count] if file is not None else adapter.prompts(purpose, count or default, seed)


def with_iterations(recipe: Recipe, iterations: int | None) -> Recipe:
    return recipe if iterations is None else replace(recipe, learning=replace(recipe.learning, iterations=iterations))


if __name__ == "__main__":
    command()
