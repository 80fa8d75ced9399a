"""``mlxquant cache-adaround-data``: step 2 of the weight track, what each block writes on the trajectories of
step 1.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from .commandline.console import Command, peak_bytes, progress, result, say, verbose_option
from .models.catalog import model_name, pretrained
from .models.diffusion import diffusion
from .pipeline import caching
from .pipeline.samples import Samples


@click.command("cache-adaround-data", cls=Command)
@click.option(
    "--calib-dir", type=click.Path(path_type=Path), required=True, help="Folder that generate-calibration-data wrote."
)
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Folder for the cache.  [default: CALIB_DIR/adaround_cache]"
)
@click.option("--num-images", default=5, show_default=True, type=click.IntRange(1), help="Use the first N images.")
@click.option("--stride", default=5, show_default=True, type=click.IntRange(1), help="Use every N-th step.")
@click.option(
    "--tokens",
    type=click.IntRange(0),
    help="Tokens of each stream of a block's output to keep; 0 keeps all.  [default: an eighth of them, at least 4]",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which tokens.")
@click.option(
    "--model",
    "name",
    help="Where its weights are: a hub id or a folder.  [default: the name of the model that drew the trajectories]",
)
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on where a killed run of the same settings was."
)
@click.option("--force", is_flag=True, help="Replace a cache that is there.")
@verbose_option
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
