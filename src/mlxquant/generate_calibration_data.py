"""``mlxquant generate-calibration-data``: step 1 of the explicit pipeline, real trajectories of the full-precision
model.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
from click.core import ParameterSource

from .api.loading import load
from .api.model import QuantizedModel
from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import (
    COUNT,
    MODEL_HELP,
    PATH,
    model_option,
    negative_option,
    option,
    size_option,
    verbose_option,
)
from .errors import CalibrationError
from .files.lock import locked
from .pipeline import samples
from .sampling.guidance import CLASSIFIER_FREE
from .sampling.picture_size import PictureSize
from .sampling.prompts import read_prompts


@click.command("generate-calibration-data", cls=Command)
@model_option("name", default="sd3-medium", help=MODEL_HELP)
@size_option
@option("--num-images", default=50, type=COUNT)
@option("--num-steps", default=50, type=COUNT, help="Sampler steps.")
@option("--cfg-weight", default=7.5, type=click.FloatRange(0), help="Weight of classifier-free guidance.")
@negative_option
@option("--calib-dir", type=PATH, required=True, help="Folder for samples, latents, images and manifest.json.")
@option(
    "--prompts",
    "prompt_file",
    type=PATH,
    help="Prompts, one seed<TAB>prompt a line; the first --num-images of them.  [default: the model's own]",
)
@option("--seed", default=0, help="Shifts the noise seeds of the model's own prompts.")
@option("--resume/--no-resume", default=True, help="Go on where a killed run of the same settings was.")
@option("--force", is_flag=True, help="Replace trajectories that are there.")
@verbose_option
def command(
    name: str,
    size: PictureSize | None,
    num_images: int,
    num_steps: int,
    cfg_weight: float,
    negative: str | None,
    calib_dir: Path,
    prompt_file: Path | None,
    seed: int,
    resume: bool,
    force: bool,
) -> None:
    """Keep the latents of real trajectories.

    Pictures are drawn, and the latent before every step is kept.
    """
    start = time.perf_counter()
    model = load(name, size)
    if isinstance(model, QuantizedModel):
        raise CalibrationError(f"{name} is quantized; draw the trajectories with the full-precision model")
    adapter = model.diffusion
    prompts = read_prompts(prompt_file) if prompt_file else adapter.prompts("calibration", num_images, seed)
    if len(prompts) < num_images:
        where = prompt_file or f"{name}'s own calibration set"
        raise CalibrationError(
            f"{where} holds {len(prompts)} prompts, --num-images is {num_images}; add prompts or ask for fewer images"
        )
    during_command(locked(calib_dir, inside=True))
    asked_for = click.get_current_context().get_parameter_source("cfg_weight") is ParameterSource.COMMANDLINE
    cfg = cfg_weight if asked_for or adapter.guidance == CLASSIFIER_FREE else adapter.cfg
    some = prompts[:num_images]
    ledger = samples.open_folder(adapter, some, num_steps, cfg, seed, calib_dir, force, resume, negative)
    during_command(ledger.same_blas())
    if ledger.complete:
        say(f"{calib_dir} is finished already, with these settings; --force would draw it again")
    done = samples.draw(adapter, ledger, progress)
    say(f"{calib_dir}: {num_images} images of {name}, {num_steps} steps each, {done.ledger.disk_bytes / 1e6:.1f} MB")
    result(
        {
            "calib_dir": str(calib_dir),
            "manifest": done.sha256,
            "model": done.model,
            "num_images": num_images,
            "num_steps": num_steps,
            "disk_bytes": done.ledger.disk_bytes,
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_bytes(),
        }
    )


if __name__ == "__main__":
    command()
