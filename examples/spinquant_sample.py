"""Text from a GPT that spinquant_ptq.py quantized.

python examples/spinquant_sample.py --ckpt spinquant_out --prompt "Test" --max_new_tokens 20
"""

from __future__ import annotations

from pathlib import Path

import click

from mlxquant.commandline.console import Command, progress
from mlxquant.sampling.text import sample_tokens
from mlxquant.spin_quant.files import load_spun


@click.command(cls=Command)
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    default=Path("spinquant_out"),
    show_default=True,
    help="The folder, or its file.",
)
@click.option("--prompt", default="import ", show_default=True)
@click.option("--max-new-tokens", "--max_new_tokens", "count", type=click.IntRange(0), default=100, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.8,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option("--seed", default=0, show_default=True)
def command(ckpt, prompt, count, temperature, seed):
    """Print a prompt and what the model makes of it."""
    model, tokenizer, _ = load_spun(ckpt)
    tokens = sample_tokens(
        model, tokenizer.encode(prompt), count, temperature, seed, model.config.n_positions, progress
    )
    click.echo(tokenizer.decode(tokens))


if __name__ == "__main__":
    command()
