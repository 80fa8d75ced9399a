"""FLUX.1-lite end to end: ``python benchmarks/mflux_lite.py --work WORK``.

A FLUX.1-lite with all of its 8 and 38 blocks, of small widths and random weights, is saved by mflux, quantized with
TCAQ-DM at W4A8 as a command would, and drawn beside itself: ``WORK/lite.png``. A picture of random weights means
nothing; that every stage of all 46 blocks goes through, and how far the picture moves, does. A killed run resumes. The
last line of stdout is one JSON object. Needs mflux and transformers: ``pip install --no-deps mflux==0.24.0``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

import mlxquant  # noqa: F401  # before mlx, so that MLX gets a fast BLAS

# isort: split
from mlxquant.commandline.console import result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.command_line import run
from support.mflux_checkpoints import small_models
from support.mflux_quantized import dense

DRAWN = ("--steps", 4, "--size", 64, "--cfg-weight", 3.5)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where models and picture go.")
@click.option("--recipe", default="tcaqdm-w4a8", show_default=True, help="Of the transformer.")
@click.option("--iters", default=60, show_default=True, help="Of learned rounding, a block.")
@click.option("--num-prompts", default=4, show_default=True, help="Of the calibration.")
def main(work: Path, recipe: str, iters: int, num_prompts: int) -> None:
    """Quantize a small FLUX.1-lite of 46 blocks, and draw it beside itself."""
    full, out, picture = work / "full", work / "quantized", work / "lite.png"
    if not full.exists():
        dense("lite", full)
    model, start = f"mflux:dev@{full}", time.monotonic()
    with small_models():
        command = ("quantize", "--model", model, "--recipe", recipe, "--iters", iters)
        _ran(*command, "--num-prompts", num_prompts, *DRAWN, "--out", out, "--force")
        seconds = time.monotonic() - start
        said = _ran(
            "generate", "--model", out, "--compare", model, "--prompt", "a lighthouse", "--output", picture, *DRAWN
        )
    result({"recipe": recipe, "seconds": seconds, "drawn": json.loads(said), "picture": str(picture)})


def _ran(*arguments: object) -> str:
    """The last line of stdout of a command, which is run in this process: its models are small ones."""
    outcome = run(*arguments)
    if outcome.exit_code:
        raise click.ClickException(outcome.output[-2000:])
    return outcome.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
