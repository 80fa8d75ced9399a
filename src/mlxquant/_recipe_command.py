"""Commands that stand for one recipe: what they parse is its bits, what they do is ``mlxquant quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .commandline.console import Command
from .commandline.options import MODEL_HELP, PATH, option, run_options, size_option
from .quantize import calibration_options
from .quantize import command as quantize

MODEL = "mmdit-shapes"


def recipe_command(name: str, method: str, weight_bits: int, input_bits: int, summary: str, how: str) -> click.Command:
    """The command ``name``, which quantizes by the recipe ``METHOD-wBaB`` with these bits by default."""
    text = f"{summary}\n\n{how}\n\nThe same as 'mlxquant quantize --recipe {method}-wBaB'."

    @click.command(name, cls=Command, help=text)
    @option("--model", default=MODEL, help=MODEL_HELP)
    @size_option
    @option("--wbits", type=int, default=weight_bits, help="Bits of a weight, 2 to 8.")
    @option("--abits", type=int, default=input_bits, help="Bits of an activation: 4, 6, 8, or 16 for none.")
    @option("--save-path", "--save_path", type=PATH, help="Folder for the model.  [default: the recipe's name]")
    @calibration_options
    @run_options
    @click.pass_context
    def command(
        ctx: click.Context, /, model: str, wbits: int, abits: int, save_path: Path | None, **passed_on: Any
    ) -> None:
        recipe = f"{method}-w{wbits}a{abits}"
        out = Path(recipe) if save_path is None else save_path
        ctx.invoke(quantize, name=model, recipe_name=recipe, out=out, **passed_on)

    return command
