"""``mlxquant generate``: one picture from any model, and beside it what another model makes of the same prompt and
seed.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from .api.loading import load
from .api.pipeline_files import is_pipeline, load_pipeline
from .api.quantizing import compare
from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import (
    COUNT,
    MFLUX_HELP,
    MODEL_HELP,
    PATH,
    model_option,
    negative_option,
    option,
    refuse,
    seed_option,
    size_option,
    verbose_option,
)
from .errors import AdapterError
from .evaluation.image_folders import read_picture
from .files.lock import locked
from .numerics.arrays import Array
from .report.comparison import Comparison, save_png, to_pil
from .sampling.picture_size import PictureSize
from .sampling.prompts import Prompt

STRENGTH = 0.6


@click.command("generate", cls=Command)
@model_option("name", required=True, help=f"{MODEL_HELP} {MFLUX_HELP} Or a folder that 'mlxquant quantize' wrote.")
@option("--prompt", "text", required=True)
@seed_option()
@option("--steps", type=COUNT, help="[default: the model's]")
@option("--cfg-weight", type=click.FloatRange(0), help="[default: the model's]")
@negative_option
@size_option
@option("--image", "start_from", type=PATH, help="Draw from this picture, scaled to the size, instead of noise.")
@option(
    "--strength",
    type=click.FloatRange(0, 1, min_open=True),
    help="How much of --image is drawn anew: the share of the steps that are taken.  [default: 0.6]",
)
@option("--compare", "reference", help="Another model: draw both and their difference side by side.")
@option("--output", type=PATH, default="image.png")
@verbose_option
def command(
    name: str,
    text: str,
    seed: int,
    steps: int | None,
    cfg_weight: float | None,
    negative: str | None,
    size: PictureSize | None,
    start_from: Path | None,
    strength: float | None,
    reference: str | None,
    output: Path,
) -> None:
    """Draw one picture as a PNG."""
    if not text.strip():
        raise AdapterError("--prompt is empty; describe the picture")
    if output.is_dir():
        raise AdapterError(f"--output {output} is a folder; name a PNG file")
    if start_from is None:
        refuse({"strength": strength}, "means nothing without --image")
    else:
        refuse({"compare": reference}, "draws from noise, and --image gives a picture")
    during_command(locked(output))
    if is_pipeline(name):
        if reference is not None and not is_pipeline(reference):
            raise AdapterError(f"--compare {reference}: {name} is a model of mflux, and so has to be what it is beside")
        refuse({"image": start_from}, f"is for models of mlxquant's own, and {name} is one of mflux")
        draw_mflux(name, text, seed, steps, cfg_weight, negative, size, reference, output)
        return
    model = load(name, size)
    facts: dict[str, object] = {}
    label = Path(name).name
    start = time.perf_counter()
    if start_from is not None:
        begin = to_pil(read_picture(start_from)[0])
        share = STRENGTH if strength is None else strength
        save_png(model.generate(text, seed, steps, cfg_weight, negative, begin, share), output)
    elif reference is None:
        image = model.images([Prompt(seed, text)], steps, cfg_weight, progress=progress, negative=negative)[0]
        save_png(to_pil(image), output)
    else:
        other = load(reference, size)
        if size is None and other.diffusion.latent_shape != model.diffusion.latent_shape:
            other.diffusion.resize(model.diffusion.size)
        comparison = compare(other, {label: model}, text, seed, steps, cfg_weight, progress, negative)
        comparison.save(output)
        facts = {"psnr_db": float(comparison.psnr_db[label].mean())}
        say(f"{name} against {reference}: {comparison.figures(label)}")
    say(f"{output}")
    result({"output": str(output), "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(), **facts})


def draw_mflux(
    name: str,
    text: str,
    seed: int,
    steps: int | None,
    cfg: float | None,
    negative: str | None,
    size: PictureSize | None,
    reference: str | None,
    output: Path,
) -> None:
    """The same with pipelines of mflux, one after the other: two of them may not fit into memory."""
    prompts, start, facts = [Prompt(seed, text)], time.perf_counter(), dict[str, object]()

    def drawn(place: str) -> Array:
        return load_pipeline(place).draw(prompts, steps, cfg, size, negative, progress)

    images = drawn(name)
    if reference is None:
        save_png(to_pil(images[0]), output)
    else:
        label, other = Path(name).name, drawn(reference)
        if other.shape != images.shape:
            raise AdapterError(f"{name} draws {images.shape[1:3]} pixels, {reference} {other.shape[1:3]}; pass --size")
        comparison = Comparison.of(prompts, {"reference": other, label: images}, lambda pictures, texts: None)
        comparison.save(output)
        facts["psnr_db"] = float(comparison.psnr_db[label].mean())
        say(f"{name} against {reference}: {comparison.figures(label)}")
    say(f"{output}")
    result({"output": str(output), "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(), **facts})


if __name__ == "__main__":
    command()
