"""``mlxquant collect-layer-activations``: step 2 of the activation track, what every layer's input looks like at each
timestep.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import COUNT, option, replay_options
from .files.lock import locked
from .models.catalog import model_name, pretrained
from .models.diffusion import diffusion
from .numerics.input_ranges import RANGE_BATCH
from .pipeline import replay
from .pipeline.samples import Samples


@click.command("collect-layer-activations", cls=Command)
@replay_options(2, "activations", "Of the rows, and of the sensitivities.")
@option("--rows", default=32, type=COUNT, help="Input rows to keep of each layer and timestep.")
@option(
    "--range-batch",
    default=RANGE_BATCH,
    type=COUNT,
    help="Average minima and maxima over batches of N images; at most all are one batch.",
)
def command(
    calib_dir: Path,
    output_dir: Path | None,
    num_images: int,
    stride: int,
    rows: int,
    range_batch: int,
    seed: int,
    name: str | None,
    resume: bool,
    force: bool,
) -> None:
    """Collect activation statistics.

    analyze-activations reads them.
    """
    start = time.perf_counter()
    samples = Samples.read(calib_dir, model_name(name))
    out = calib_dir / "activations" if output_dir is None else output_dir
    model = diffusion(pretrained(name or samples.model))
    during_command(locked(out, inside=True))
    stats = replay.collect(model, samples, num_images, stride, rows, seed, out, force, resume, progress, range_batch)
    disk_bytes = stats.ledger.disk_bytes
    say(
        f"{out}: {len(stats.layers)} layers with {len(stats.leaders)} inputs, {len(stats.sigmas)} timesteps,"
        f" {disk_bytes / 1e6:.1f} MB"
    )
    result(
        {
            "output_dir": str(out),
            "model": stats.model,
            "layers": len(stats.layers),
            "timesteps": len(stats.sigmas),
            "range_batch": stats.range_batch,
            "disk_bytes": disk_bytes,
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_bytes(),
        }
    )


if __name__ == "__main__":
    command()
