"""``mlxquant quantize``: any recipe on any model, one command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .api import jobs
from .api.dry_run import plan_pipeline
from .api.loading import load
from .api.machine import memory_bytes
from .api.model import Model
from .api.pipeline_files import save_pipeline
from .api.pipelines import TEXT_RECIPE, quantize_pipeline
from .api.plan import of_first_blocks, plan, planned_sizes, usual_recipe
from .api.quantizing import calibrate, calibrate_text
from .calibration.data import CalibrationData
from .commandline.console import Command, peak_bytes, progress, result, say
from .commandline.options import (
    COUNT,
    MFLUX_HELP,
    MODEL_HELP,
    PATH,
    iters_option,
    model_option,
    negative_option,
    option,
    pipeline_options,
    prompts_options,
    refuse,
    run_options,
    size_option,
    together,
)
from .errors import AdapterError, RecipeError
from .exporters.pipelines import write_pipeline
from .models.mflux.names import is_mflux
from .models.mflux.outline import unread
from .models.mflux.pipeline import MfluxPipeline
from .models.recorded.recording import SAMPLES
from .pipeline.apply import TrackFiles
from .recipes.grammar import parse_recipe
from .recipes.ladder import GROUPED, PLAIN, explained
from .recipes.recipe import Recipe
from .sampling.picture_size import PictureSize, told
from .sampling.prompts import read_prompts
from .sweep.share import planned_share
from .sweep.two_sided import KIND as TWO_SIDED

PROMPTS, KEEP = 16, "keep"
CALIBRATION_SIZE = (512, 512)  # of pictures of mflux: what a step reads is a quarter of that at its own 1024
SIZES = ("name", "recipe", "weights", "before", "after", "bits_per_weight")  # of a component
calibration_options = together(
    prompts_options("Calibration prompts", PROMPTS),
    option("--steps", type=COUNT, help="Sampler steps of the calibration.  [default: the model's]"),
    option("--cfg-weight", type=click.FloatRange(0), help="Guidance of the calibration.  [default: the model's]"),
    negative_option,
    option(
        "--samples",
        type=COUNT,
        help="At most so many pairs of a picture and a step go through the layers.  [default: the model's]",
    ),
    option("--data", type=PATH, help="Calibration text of a language model.  [default: Python's standard library]"),
    option(
        "--length",
        type=click.IntRange(2),
        help="Tokens of a window of that text; --samples says how many windows.  [default: the model's]",
    ),
    option("--seed", default=0, help="Shifts the noise seeds of the model's own prompts, or chooses other windows."),
)


@click.command("quantize", cls=Command)
@model_option("name", required=True, help=f"{MODEL_HELP} {MFLUX_HELP}")
@size_option
@option(
    "--recipe",
    "recipe_name",
    help="METHOD[+INGREDIENT…]-wBaB, such as gptq-w4a8, or fast-, good- or best-wBaB; see 'mlxquant methods'."
    f"  [default: {GROUPED}, which MLX's programs read; {PLAIN} where 64 does not divide the layers]",
)
@option(
    "--override",
    multiple=True,
    metavar="PATTERN=SPEC",
    help="A rule before the recipe's own: '*.mlp.fc2=w8a16', '@attention=keep'.",
)
@calibration_options
@option(
    "--blocks", type=COUNT, help="Quantize the first N blocks alone, to see soon what a recipe does.  [default: all]"
)
@option(
    "--bits-per-weight",
    type=click.FloatRange(2, 8),
    help="Give each layer its own bits, so many on average, scales included.",
)
@option(
    "--bits-per-activation",
    type=click.FloatRange(4, 8),
    help="The same for inputs, by the arithmetic they take part in.",
)
@option(
    "--require-share",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Refuse a recipe that quantizes less than this share of the parameters, such as 0.95.",
)
@iters_option
@option("--adaround-output", type=PATH, help="Take the blocks' weights from this folder of adaround-optimize.")
@option("--quant-config", type=PATH, help="And their activation scales from this file of analyze-activations.")
@pipeline_options
@option("--dry-run", is_flag=True, help="Say what it would write and take, from the headers of the weights alone.")
@option("--out", type=PATH, help="Folder for the quantized model; a dry run needs none.")
@run_options
def command(
    name: str,
    size: PictureSize | None,
    recipe_name: str | None,
    override: tuple[str, ...],
    blocks: int | None,
    bits_per_weight: float | None,
    bits_per_activation: float | None,
    require_share: float | None,
    iters: int | None,
    adaround_output: Path | None,
    quant_config: Path | None,
    out: Path | None,
    dry_run: bool,
    force: bool,
    resume: bool,
    text_recipe: str | None,
    vae_recipe: str | None,
    lora_paths: tuple[str, ...],
    lora_scales: tuple[float, ...],
    **calibration: Any,
) -> None:
    """Quantize a model with calibration and write it.

    Any recipe on any model; the result is a folder. A model of mflux (mflux:z-image-turbo) becomes one that mflux runs.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    model = None if is_mflux(name) or recipe_name is not None else load(name, size)  # which decides on a recipe
    recipe_name = recipe_name or (GROUPED if model is None else usual_recipe(model))
    if (stands := explained(recipe_name)) is not None:
        say(stands)
    recipe = limited(parse_recipe(recipe_name, override), bits_per_weight, bits_per_activation)
    if iters is not None:
        recipe = replace(recipe, learning=replace(recipe.learning, iterations=iters))
    pipeline: dict[str, Any] = {"text_recipe": text_recipe, "vae_recipe": vae_recipe}
    pipeline |= {"lora_paths": lora_paths, "lora_scales": lora_scales}
    if is_mflux(name):
        others = {"blocks": blocks, "require_share": require_share, "adaround_output": adaround_output}
        others |= {"quant_config": quant_config, "data": calibration.pop("data"), "length": calibration.pop("length")}
        refuse(others, f"mean nothing for {name}, a pipeline of mflux")
        quantize_mflux(name, recipe, None if dry_run else out, force, resume, size, **pipeline, **calibration)
        return
    refuse(pipeline, f"are for pipelines of mflux, and {name} is none")
    if quant_config is not None and adaround_output is None:
        raise RecipeError("--quant-config has the activation scales for the weights of --adaround-output; pass both")
    tracks = None if adaround_output is None else TrackFiles(adaround_output, quant_config)
    model = model or load(name, size)
    if blocks is not None:
        recipe = of_first_blocks(model, recipe, blocks)
    layers = plan(model, recipe)
    share = planned_share(model.adapter, layers)
    say(f"{recipe.name}: {share}")
    if require_share is not None:
        share.require(require_share, recipe.name)
    if tracks is not None:
        tracks.store(model.clone(), layers)  # refused now, if at all, and not after the calibration
        if quant_config is None:
            say("without --quant-config the blocks keep unquantized activations")
    if dry_run or out is None:
        sizes = planned_sizes(model, recipe, layers)
        say(str(sizes))
        result(sizes.facts)
        return
    with jobs.work_folder(out, force, resume) as work:
        calib = calibrated(model, work, **calibration)
        done = jobs.quantized(model, calib, recipe, work, progress, tracks)
        done.model.save(out, force)
    stored = done.model.size
    stages = done.model.facts["stages"]
    say(f"{out}: {stored.model_bytes / 1e6:.2f} MB, {stored.bits_per_weight:.2f} bits per weight, {done.seconds:.0f} s")
    if chosen := done.model.facts.get(TWO_SIDED):
        say(f"  rounding: {chosen['chosen']}, by held-out samples")
    for what, paths in done.model.facts.get("left_undone", {}).items():
        say(f"  {what}: not for {len(paths)} layers that are no Linears, such as {paths[0]}")
    for stage in stages:
        if stage["kept"] == "rtn" and len(stage["errors"]) > 1:
            say(f"  {stage['stage']}: round-to-nearest was better and was kept")
    result(
        {
            "out": str(out),
            "recipe": recipe.name,
            "model_bytes": stored.model_bytes,
            "bits_per_weight": stored.bits_per_weight,
            "bits_per_quantized_weight": stored.bits_per_quantized_weight,
            "share": share.facts,
            "seconds_quantize": done.seconds,
            "peak_bytes": peak_bytes(),
            "kept": {stage["stage"]: stage["kept"] for stage in stages},
        }
    )


def calibrated(
    model: Model,
    work: Path,
    prompt_file: Path | None,
    num_prompts: int | None,
    steps: int | None,
    cfg_weight: float | None,
    negative: str | None,
    samples: int | None,
    seed: int,
    data: Path | None,
    length: int | None,
) -> CalibrationData:
    """What the ``calibration_options`` say: text for a language model, pictures for one that draws; raises AdapterError
    on options that are for the other kind.
    """
    if not model.adapter.draws:
        pictures = {
            "--prompts": prompt_file,
            "--num-prompts": num_prompts,
            "--steps": steps,
            "--cfg-weight": cfg_weight,
            "--negative-prompt": negative,
        }
        if given := [name for name, value in pictures.items() if value is not None]:
            raise AdapterError(
                f"{model.name} is a language model, for which {' and '.join(given)} mean nothing; calibrate with --data"
                " TEXT"
            )
        return calibrate_text(model, data, samples, length, seed)
    if data is not None or length is not None:
        raise AdapterError(
            f"{model.name} draws pictures, for which --data and --length mean nothing; calibrate with --prompts FILE"
        )
    adapter = model.diffusion
    prompts = (
        read_prompts(prompt_file)[:num_prompts]
        if prompt_file
        else adapter.prompts("calibration", num_prompts or PROMPTS, seed)
    )
    return calibrate(
        model, prompts, steps, cfg_weight, progress=progress, samples=samples, work=work, negative=negative
    )


def quantize_mflux(
    name: str,
    recipe: Recipe,
    out: Path | None,
    force: bool,
    resume: bool,
    size: PictureSize | None,
    text_recipe: str | None,
    vae_recipe: str | None,
    lora_paths: Sequence[str],
    lora_scales: Sequence[float],
    prompt_file: Path | None,
    num_prompts: int | None,
    steps: int | None,
    cfg_weight: float | None,
    negative: str | None,
    samples: int | None,
    seed: int,
) -> None:
    """Quantize a pipeline of mflux and write the folder that mflux runs, or one of ours where layers do more than mflux
    has a place for. Without ``out`` only say what that would take.
    """
    if len(lora_scales) > len(lora_paths):
        raise AdapterError(f"--lora-scales: {len(lora_scales)} scales for {len(lora_paths)} files of --lora-paths")
    scales = [*lora_scales, *[1.0] * (len(lora_paths) - len(lora_scales))]
    specs = [spec for _, spec in recipe.rules if spec is not None]
    ours = any(spec.activation or spec.branch or spec.transforms for spec in specs) or recipe.probabilities is not None
    pixels = size or CALIBRATION_SIZE
    loras = list(zip(lora_paths, scales, strict=True))
    texts = TEXT_RECIPE if text_recipe is None else None if text_recipe == KEEP else text_recipe
    recipes = (recipe, texts, None if vae_recipe in (None, KEEP) else vae_recipe)
    how: dict[str, Any] = {"steps": steps, "cfg": cfg_weight, "size": pixels, "negative": negative}
    how["samples"] = samples or SAMPLES
    given = None if prompt_file is None else read_prompts(prompt_file)[:num_prompts]
    count = len(given) if given is not None else num_prompts or PROMPTS
    if out is None:
        with unread():
            pipeline = MfluxPipeline.load(name, loras)
        planned = plan_pipeline(pipeline, count, *recipes, **how)
        say(str(planned))
        say(planned.told_of_memory(memory_bytes()))
        result(planned.facts)
        return
    with jobs.work_folder(out, force, resume) as work:
        pipeline = MfluxPipeline.load(name, loras)
        if advice := plan_pipeline(pipeline, count, *recipes, **how, measure=False).require_memory(memory_bytes()):
            say(f"warning: {advice}")
        prompts = pipeline.prompts("calibration", count, seed) if given is None else given
        start = time.perf_counter()
        report = quantize_pipeline(pipeline, prompts, *recipes, **how, work=work, progress=progress)
        seconds = time.perf_counter() - start
        drawn = {"prompts": len(prompts), "steps": steps or pipeline.steps, "size": told(pixels)}
        if ours:
            save_pipeline(pipeline, report, out, {"calibration": drawn, **report.facts}, force)
        else:
            write_pipeline(pipeline, out, {"calibration": drawn, **report.facts}, force)
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(str(report))
    runs = "'mlxquant generate'" if ours else "mflux"
    say(f"{out}: {nbytes / 1e9:.3f} GB, {seconds:.0f} s; {runs} runs it with --model {out}")
    result(
        {
            "out": str(out),
            "target": "mlxquant" if ours else "mflux",
            "recipe": recipe.name,
            "bytes": nbytes,
            "components": [{key: one.facts[key] for key in SIZES} for one in report.components],
            "seconds_quantize": seconds,
            "peak_bytes": peak_bytes(),
        }
    )


def limited(recipe: Recipe, bits_per_weight: float | None, bits_per_activation: float | None) -> Recipe:
    """A recipe with limits on its average bits, which its name then says."""
    if bits_per_weight is not None:
        recipe = replace(
            recipe, name=f"{recipe.name},bits-per-weight={bits_per_weight:g}", bits_per_weight=bits_per_weight
        )
    if bits_per_activation is not None:
        recipe = replace(
            recipe,
            name=f"{recipe.name},bits-per-activation={bits_per_activation:g}",
            bits_per_activation=bits_per_activation,
        )
    return recipe


if __name__ == "__main__":
    command()
