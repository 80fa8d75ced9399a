"""Commands that stand for one recipe: what they parse is its bits, what they do is ``mlxquant quantize``."""

from __future__ import annotations

from pathlib import Path

import click

from .commandline.console import MODEL_HELP, Command, force_option, resume_option, size_option, verbose_option
from .quantize import command as quantize

MODEL = "mmdit-shapes"


def recipe_command(name: str, method: str, weight_bits: int, input_bits: int, summary: str, how: str) -> click.Command:
    """The command ``name``, which quantizes by the recipe ``METHOD-wBaB`` with these bits by default."""
    text = f"{summary}\n\n{how}\n\nThe same as 'mlxquant quantize --recipe {method}-wBaB'."

    @click.command(name, cls=Command, help=text)
    @click.option("--model", default=MODEL, show_default=True, help=MODEL_HELP)
    @size_option
    @click.option("--wbits", type=int, default=weight_bits, show_default=True, help="Bits of a weight, 2 to 8.")
    @click.option(
        "--abits",
        type=int,
        default=input_bits,
        show_default=True,
        help="Bits of an activation: 4, 6, 8, or 16 for none.",
    )
    @click.option(
        "--save-path",
        "--save_path",
        type=click.Path(path_type=Path),
        help="Folder for the model.  [default: the recipe's name]",
    )
    @click.option("--prompts", type=click.Path(path_type=Path), help="Calibration prompts, as of 'mlxquant quantize'.")
    @click.option("--num-prompts", type=click.IntRange(1), help="Use the first N prompts.")
    @click.option("--steps", type=click.IntRange(1), help="Sampler steps of the calibration.  [default: the model's]")
    @click.option("--data", type=click.Path(path_type=Path), help="Calibration text of a language model.")
    @click.option("--length", type=click.IntRange(2), help="Tokens of a window of that text.")
    @click.option(
        "--samples", type=click.IntRange(1), help="At most so many pairs of a picture and a step, or windows of text."
    )
    @click.option("--seed", default=0, show_default=True, help="Shifts the noise seeds of the model's own prompts.")
    @force_option
    @resume_option
    @verbose_option
    @click.pass_context
    def command(
        ctx: click.Context,
        model: str,
        size: int | None,
        wbits: int,
        abits: int,
        save_path: Path | None,
        prompts: Path | None,
        num_prompts: int | None,
        steps: int | None,
        data: Path | None,
        length: int | None,
        samples: int | None,
        seed: int,
        force: bool,
        resume: bool,
    ) -> None:
        recipe = f"{method}-w{wbits}a{abits}"
        ctx.invoke(
            quantize,
            name=model,
            size=size,
            recipe_name=recipe,
            prompt_file=prompts,
            num_prompts=num_prompts,
            steps=steps,
            data=data,
            length=length,
            samples=samples,
            seed=seed,
            out=Path(recipe) if save_path is None else save_path,
            force=force,
            resume=resume,
        )

    return command
