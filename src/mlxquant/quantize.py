"""``mlxquant quantize``: any recipe on any model, one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .api import jobs
from .api.loading import load
from .api.model import Model
from .api.plan import of_first_blocks, plan
from .api.quantizing import calibrate, calibrate_text
from .calibration.data import CalibrationData
from .commandline.console import Command, peak_bytes, progress, result, say
from .commandline.options import (
    COUNT,
    MODEL_HELP,
    PATH,
    iters_option,
    negative_option,
    option,
    prompts_options,
    run_options,
    size_option,
    together,
)
from .errors import AdapterError, RecipeError
from .pipeline.apply import TrackFiles
from .recipes.grammar import parse_recipe
from .recipes.recipe import Recipe
from .sampling.picture_size import PictureSize
from .sampling.prompts import read_prompts
from .sweep.share import planned_share

calibration_options = together(
    prompts_options("Calibration prompts", 16),
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
@option("--model", "name", required=True, help=MODEL_HELP)
@size_option
@option(
    "--recipe",
    "recipe_name",
    required=True,
    help="METHOD[+INGREDIENT…]-wBaB, such as gptq-w4a8; see 'mlxquant methods'.",
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
@option("--out", type=PATH, required=True, help="Folder for the quantized model.")
@run_options
def command(
    name: str,
    size: PictureSize | None,
    recipe_name: str,
    override: tuple[str, ...],
    blocks: int | None,
    bits_per_weight: float | None,
    bits_per_activation: float | None,
    require_share: float | None,
    iters: int | None,
    adaround_output: Path | None,
    quant_config: Path | None,
    out: Path,
    force: bool,
    resume: bool,
    **calibration: Any,
) -> None:
    """Quantize a model with calibration and write it.

    Any recipe on any model; the result is a folder.
    """
    recipe = limited(parse_recipe(recipe_name, override), bits_per_weight, bits_per_activation)
    if iters is not None:
        recipe = replace(recipe, learning=replace(recipe.learning, iterations=iters))
    if quant_config is not None and adaround_output is None:
        raise RecipeError("--quant-config has the activation scales for the weights of --adaround-output; pass both")
    tracks = None if adaround_output is None else TrackFiles(adaround_output, quant_config)
    model = load(name, size)
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
    with jobs.work_folder(out, force, resume) as work:
        calib = calibrated(model, work, **calibration)
        done = jobs.quantized(model, calib, recipe, work, progress, tracks)
        done.model.save(out, force)
    stored = done.model.size
    stages = done.model.facts["stages"]
    say(f"{out}: {stored.model_bytes / 1e6:.2f} MB, {stored.bits_per_weight:.2f} bits per weight, {done.seconds:.0f} s")
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
        else adapter.prompts("calibration", num_prompts or 16, seed)
    )
    return calibrate(
        model, prompts, steps, cfg_weight, progress=progress, samples=samples, work=work, negative=negative
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
