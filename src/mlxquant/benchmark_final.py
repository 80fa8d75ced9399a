"""``mlxquant benchmark-final``: log-SNR scales, sequential GPTQ and Qronos compared on one model, as ``mlxquant
evaluate`` with their recipes.

Similarity to the baseline, size, latency and memory; LPIPS, CLIP score and FID where their networks are asked for with
``--metric``.
"""

from __future__ import annotations

from typing import Any

import click

from .commandline.console import Command
from .commandline.options import MODEL_HELP, PATH, force_option, option, verbose_option
from .evaluate import command as evaluate
from .evaluate import drawing_options

RECIPES = ("rtn+logsnr-w8a8", "gptq+sequential-w4a8", "qronos+damped-w4a8", "qronos+damped-w4a4")


@click.command("benchmark-final", cls=Command)
@click.argument("folders", nargs=-1)
@option("--model", default="mmdit-shapes", help=f"The baseline. {MODEL_HELP}")
@drawing_options
@option("--out", type=PATH, default="benchmark-final", help="Folder for the report.")
@force_option
@verbose_option
@click.pass_context
def command(ctx: click.Context, /, folders: tuple[str, ...], model: str, **passed_on: Any) -> None:
    """Compare quantized models with their baseline.

    The models are FOLDERS; without any, the baseline is quantized first, by four recipes.
    """
    ctx.invoke(evaluate, names=(model, *folders), recipe_names=() if folders else RECIPES, **passed_on)


if __name__ == "__main__":
    command()
