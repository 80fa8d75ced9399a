"""Commands that stand for recipes: what they parse is the bits, what they do is ``mlxquant quantize`` or ``mlxquant
evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .commandline.console import Command
from .commandline.options import (
    COUNT,
    MODEL_HELP,
    PATH,
    force_option,
    model_option,
    option,
    run_options,
    size_option,
    verbose_option,
)
from .evaluate import command as evaluate
from .evaluate import drawing_options
from .quantize import calibration_options
from .quantize import command as quantize

MODEL = "mmdit-shapes"


def recipe_command(
    name: str, method: str, weight_bits: int, input_bits: int, summary: str, how: str, blocks: int | None = None
) -> click.Command:
    """The command ``name``, which quantizes by the recipe ``METHOD-wBaB`` with these bits by default, and by default so
    many ``blocks``, None for the whole model.
    """
    text = f"{summary}\n\n{how}\n\nThe same as 'mlxquant quantize --recipe {method}-wBaB'."

    @click.command(name, cls=Command, help=text)
    @model_option(default=MODEL, help=MODEL_HELP)
    @size_option
    @option("--wbits", type=int, default=weight_bits, help="Bits of a weight, 2 to 8.")
    @option("--abits", type=int, default=input_bits, help="Bits of an activation: 4, 6, 8, or 16 for none.")
    @option(
        "--blocks",
        type=COUNT,
        default=blocks,
        help=f"Quantize the first N blocks alone.{'' if blocks else '  [default: all, and what is around them]'}",
    )
    @option("--save-path", "--save_path", type=PATH, help="Folder for the model.  [default: the recipe's name]")
    @calibration_options
    @run_options
    @click.pass_context
    def command(
        ctx: click.Context,
        /,
        model: str,
        wbits: int,
        abits: int,
        blocks: int | None,
        save_path: Path | None,
        **passed_on: Any,
    ) -> None:
        recipe = f"{method}-w{wbits}a{abits}"
        folder = recipe if blocks is None else f"{recipe},blocks={blocks}"
        out = Path(folder) if save_path is None else save_path
        ctx.invoke(quantize, name=model, recipe_name=recipe, blocks=blocks, out=out, **passed_on)

    return command


def comparison_command(name: str, recipes: Sequence[str], summary: str, how: str) -> click.Command:
    """The command ``name``, which evaluates folders with quantized models, or without any the baseline by these
    recipes.
    """
    text = f"{summary}\n\nThe models are FOLDERS; without any, the baseline is quantized first, {how}."

    @click.command(name, cls=Command, help=text)
    @click.argument("folders", nargs=-1)
    @model_option(default=MODEL, help=f"The baseline. {MODEL_HELP}")
    @drawing_options
    @option("--out", type=PATH, default=name, help="Folder for the report.")
    @force_option
    @verbose_option
    @click.pass_context
    def command(ctx: click.Context, /, folders: tuple[str, ...], model: str, **passed_on: Any) -> None:
        ctx.invoke(evaluate, names=(model, *folders), recipe_names=() if folders else tuple(recipes), **passed_on)

    return command
