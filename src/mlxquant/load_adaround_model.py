"""``mlxquant load-adaround-model``: both tracks' outputs in one model, and the pictures that show what each
part costs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from .api.loading import load
from .api.model import Model, QuantizedModel
from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import COUNT, PATH, SEED, model_option, negative_option, option, size_option, verbose_option
from .errors import AdapterError
from .files.atomic import claimed
from .files.checked import write_json
from .files.lock import locked
from .layers.tree import set_module
from .models.catalog import model_name
from .pipeline.apply import TrackFiles, install
from .pipeline.weight_files import WeightFiles
from .recipes.recipe import LayerSpec
from .report.comparison import Comparison, save_png, to_pil
from .sampling.picture_size import PictureSize
from .sampling.prompts import Prompt, read_prompts
from .sweep.rounding import round_to_nearest


@click.command("load-adaround-model", cls=Command)
@option("--adaround-output", type=PATH, required=True, help="Folder that 'mlxquant adaround-optimize' wrote.")
@option("--quant-config", type=PATH, help="File that 'mlxquant analyze-activations' wrote: adds V2 (W4A8).")
@option("--prompt", "texts", multiple=True, help="What to draw; may be given several times.")
@option("--prompts", "prompt_file", type=PATH, help="And a file of prompts, one seed<TAB>prompt a line.")
@option("--num-prompts", type=COUNT, help="Of the file, only the first N.")
@option("--seed", default=42, type=SEED, help="Of the first prompt; the next ones count up.")
@option("--num-steps", type=COUNT, help="[default: the model's]")
@option("--cfg-weight", type=click.FloatRange(0), help="[default: the model's]")
@negative_option
@option("--output-image", type=PATH, default="quant_test.png")
@option("--compare", is_flag=True, help="Draw full precision, round-to-nearest, V1 and V2 side by side.")
@option(
    "--diff-stats",
    is_flag=True,
    help="Measure each against full precision; writes OUTPUT_IMAGE with the suffix .diff.json.",
)
@option("--save", "folder", type=PATH, help="Write the model as a folder for 'mlxquant generate'.")
@model_option("name", help="Where the model is: a hub id or a folder.  [default: the model of the weights]")
@size_option
@option("--force", is_flag=True, help="Replace an existing --save folder.")
@verbose_option
def command(
    adaround_output: Path,
    quant_config: Path | None,
    texts: tuple[str, ...],
    prompt_file: Path | None,
    num_prompts: int | None,
    seed: int,
    num_steps: int | None,
    cfg_weight: float | None,
    negative: str | None,
    output_image: Path,
    compare: bool,
    diff_stats: bool,
    folder: Path | None,
    name: str | None,
    size: PictureSize | None,
    force: bool,
) -> None:
    """Draw with what the other steps have made.

    Loads learned weights, V1, and with --quant-config static activation scales for every timestep, V2.
    """
    start = time.perf_counter()
    prompts = [Prompt(seed + index, text) for index, text in enumerate(texts)]
    prompts += read_prompts(prompt_file)[:num_prompts] if prompt_file is not None else []
    if not prompts or not all(prompt.text.strip() for prompt in prompts):
        raise AdapterError(
            "--prompt is empty or missing; describe the picture, or pass a file of prompts with --prompts"
        )
    if output_image.is_dir():
        raise AdapterError(f"--output-image {output_image} is a folder; name a PNG file")
    during_command(locked(output_image))
    if folder is not None:
        during_command(claimed(folder, force))
    facts = WeightFiles.facts(adaround_output)
    if model_name(name) not in (None, facts["model"]):
        raise AdapterError(
            f"{adaround_output} is of model {facts['model']!r}, not of {name!r}; leave --model out or optimize that"
            " model"
        )
    files = TrackFiles(adaround_output, quant_config)
    exact = load(name or facts["model"], size)
    models = {"V1": assemble(exact, files, active=False)}
    if quant_config is not None:
        models["V2"] = assemble(exact, files, active=True)
    final = next(reversed(models.values()))
    drawn = {**references(exact, final), **models} if compare or diff_stats else {"": final}
    images = {
        key: model.images(prompts, num_steps, cfg_weight, progress=progress, negative=negative)
        for key, model in drawn.items()
    }
    comparison = Comparison.of(prompts, images, final.diffusion.attributes)
    report = differences(comparison)
    if compare:
        comparison.save(output_image)
    else:
        *_, pictures = images.values()
        save_png(to_pil(np.concatenate(list(pictures), axis=1)), output_image)
    if diff_stats:
        data = {"models": report, "prompts": [[p.seed, p.text] for p in prompts]}
        write_json(output_image.with_suffix(".diff.json"), "difference-statistics", data)
    if report:
        say(f"{'against FP':<12}{'PSNR dB':>9}{'mean |d|':>10}{'max |d|':>9}{'> 1/255':>9}")
        for key, row in report.items():
            say(f"{key:<12}{row['psnr_db']:>9.2f}{row['mean_abs']:>10.5f}{row['max_abs']:>9.3f}{row['changed']:>9.1%}")
    if folder is not None:
        final.save(folder, force)
        say(f"{folder}: {final.size.model_bytes / 1e6:.2f} MB, {final.size.bits_per_weight:.2f} bits per weight")
    say(f"{output_image}")
    facts = {
        "output": str(output_image),
        "models": report,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }
    result({**facts, "saved": None if folder is None else str(folder)})


def assemble(exact: Model, files: TrackFiles, active: bool) -> QuantizedModel:
    """A model with the tracks' layers in its blocks and everything else as in ``exact``; ``active`` quantizes the
    activations.
    """
    made_from = WeightFiles.facts(files.weights)
    adapter = exact.clone()
    stages = install(adapter, files.store(adapter, active=active), adapter.blocks)
    facts = {
        "recipe": made_from["recipe"],
        "calibration": made_from["calibration"],
        "tracks": files.digests,
        "stages": [stage.facts for stage in stages],
    }
    return QuantizedModel(adapter, facts)


def references(exact: Model, like: QuantizedModel) -> dict[str, Model]:
    """What a model is compared with: full precision, and the same layers in the same formats, rounded to nearest, with
    exact inputs.
    """
    adapter = exact.clone()
    linears = adapter.layers()
    for path, layer in like.layers.items():
        set_module(adapter.module, path, round_to_nearest(linears[path], LayerSpec(layer.format)))
    return {"FP": exact, "RTN": Model(adapter)}


def differences(comparison: Comparison) -> dict[str, Any]:
    """Of every model's pictures against the first: PSNR and the absolute difference of values in [0,1]."""
    report = {}
    for name, decibels in comparison.psnr_db.items():
        gap = np.abs(comparison.images[name] - comparison.images[comparison.reference])
        report[name] = {
            "psnr_db": float(decibels.mean()),
            "mean_abs": float(gap.mean()),
            "max_abs": float(gap.max()),
            "changed": float((gap > 1 / 255).mean()),
            "p99_abs": float(np.percentile(gap, 99)),
        }
    return report


if __name__ == "__main__":
    command()
