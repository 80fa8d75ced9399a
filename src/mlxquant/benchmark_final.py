"""``mlxquant benchmark-final``: log-SNR scales, sequential GPTQ and Qronos compared on one model, as ``mlxquant
evaluate`` with their recipes.

Similarity to the baseline, size, latency and memory; LPIPS, CLIP score and FID where their networks are asked for with
``--metric``.
"""

from __future__ import annotations

from pathlib import Path

import click

from .commandline.console import MODEL_HELP, Command, force_option, size_option, verbose_option
from .evaluate import command as evaluate
from .evaluation.metric_options import metric_option, weights_option

RECIPES = ("rtn+logsnr-w8a8", "gptq+sequential-w4a8", "qronos+damped-w4a8", "qronos+damped-w4a4")


@click.command("benchmark-final", cls=Command)
@click.argument("folders", nargs=-1)
@click.option("--model", default="mmdit-shapes", show_default=True, help=f"The baseline. {MODEL_HELP}")
@size_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts to draw.  [default: the model's own, held out from calibration]",
)
@click.option("--num-prompts", type=click.IntRange(1), help="Use the first N prompts.")
@click.option("--steps", type=click.IntRange(1), help="Sampler steps.  [default: the model's]")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Shifts the noise seeds of the model's own prompts.",
)
@metric_option
@weights_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="benchmark-final",
    show_default=True,
    help="Folder for the report.",
)
@force_option
@verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    folders: tuple[str, ...],
    model: str,
    size: int | None,
    prompts: Path | None,
    num_prompts: int | None,
    steps: int | None,
    seed: int,
    asked: tuple[str, ...],
    weights: tuple[str, ...],
    out: Path,
    force: bool,
) -> None:
    """Compare quantized models with their baseline.

    The models are FOLDERS; without any, the baseline is quantized first, by four recipes.
    """
    ctx.invoke(
        evaluate,
        names=(model, *folders),
        recipe_names=() if folders else RECIPES,
        size=size,
        prompt_file=prompts,
        num_prompts=num_prompts,
        steps=steps,
        seed=seed,
        asked=asked,
        weights=weights,
        out=out,
        force=force,
    )


if __name__ == "__main__":
    command()
