"""``mlxquant cache-adaround-data``: step 2 of the weight track, what each block writes on the trajectories of
step 1.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import FROM_ZERO, option, replay_options
from .files.lock import locked
from .models.catalog import model_name, pretrained
from .models.diffusion import diffusion
from .pipeline import caching
from .pipeline.samples import Samples


@click.command("cache-adaround-data", cls=Command)
@replay_options(5, "adaround_cache", "Decides which tokens.")
@option(
    "--tokens",
    type=FROM_ZERO,
    help="Tokens of each stream of a block's output to keep; 0 keeps all.  [default: an eighth of them, at least 4]",
)
def command(
    calib_dir: Path,
    output_dir: Path | None,
    num_images: int,
    stride: int,
    tokens: int | None,
    seed: int,
    name: str | None,
    resume: bool,
    force: bool,
) -> None:
    """Cache what every block writes.

    adaround-optimize reads it.
    """
    start = time.perf_counter()
    samples = Samples.read(calib_dir, model_name(name))
    adapter = diffusion(pretrained(name or samples.model))
    out = calib_dir / "adaround_cache" if output_dir is None else output_dir
    plan = caching.plan(adapter, samples, num_images, stride, tokens, seed)
    theirs = (
        f"{plan.full_bytes / 1e6:.1f} MB with every block's inputs and outputs and the text conditioning of every step"
    )
    say(f"{out} needs {plan.disk_bytes / 1e6:.1f} MB of disk; it would be {theirs}")
    during_command(locked(out, inside=True))
    cache = caching.write(plan, adapter, out, force, resume, progress)
    say(
        f"{out}: {len(cache.blocks)} blocks at {len(cache.sigmas)} steps of {num_images} images,"
        f" {cache.ledger.disk_bytes / 1e6:.1f} MB"
    )
    result(
        {
            "output_dir": str(out),
            "model": cache.model,
            "blocks": len(cache.blocks),
            "samples": num_images * len(cache.sigmas),
            "disk_bytes": cache.ledger.disk_bytes,
            "seed_layout_bytes": plan.full_bytes,
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_bytes(),
        }
    )


if __name__ == "__main__":
    command()
