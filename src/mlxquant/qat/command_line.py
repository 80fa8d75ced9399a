"""The table of quantization options on a command line: any of them, with underscores or with dashes, and a help that
stays short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .options import EMBEDDINGS, OPTIONS, POINTS, PROJECTIONS, Option

PATTERNS = f"""\b
Quantization options, as a pattern (--list-quantization lists all {len(OPTIONS)}):
  --quantize-attn-act-POINT, --no-quantize-attn-act-POINT, --quantize-attn-act-POINT-bits
      POINT: {", ".join(POINTS["attn"][:4])},
             {", ".join(POINTS["attn"][4:])}
  --quantize-mlp-act-POINT, --no-quantize-mlp-act-POINT, --quantize-mlp-act-POINT-bits
      POINT: {", ".join(POINTS["mlp"])}
  --linear-variant-PART, --quantize-linear-PART-method, --quantize-linear-PART-bits
      PART: {", ".join(PROJECTIONS)}
  --quantize-EMBEDDING, --quantize-EMBEDDING-method, --quantize-EMBEDDING-bits
      EMBEDDING: {", ".join(EMBEDDINGS)}

An option for one place always counts more than the one for all, also a no. Underscores and dashes are the same."""


def quantization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option of the table to a command, which gets those that were given, and None for the others."""
    for option in reversed(OPTIONS.values()):
        command = _declared(option)(command)
    listing = click.option(
        "--list-quantization",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_list,
        help="List every quantization option.",
    )
    return listing(command)


def _declared(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    dashed = option.name.replace("_", "-")
    kinds = {
        "flag": click.BOOL,
        "bits": click.IntRange(2, 8),
        "count": click.IntRange(0),
        "choice": click.Choice(option.choices),
    }
    spelled = f"--{dashed}/--no-{dashed}" if option.kind == "flag" else f"--{dashed}"
    text = f"{option.help}  [default: {_default(option)}]"
    return click.option(spelled, option.name, type=kinds[option.kind], default=None, help=text, hidden=option.special)


def _default(option: Option) -> str:
    if option.follows:
        return f"as --{option.follows.replace('_', '-')}"
    return {False: "no", None: "none"}.get(option.default, str(option.default))


def _list(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        for line in table():
            click.echo(line)
        ctx.exit()


def table() -> list[str]:
    """A line for each option: its name, what it takes, what it does, and its default."""
    takes = {"flag": "", "bits": "2-8", "count": "N"}
    rows = [(f"--{name}", takes.get(option.kind, "|".join(option.choices)), option) for name, option in OPTIONS.items()]
    width = max(len(name) for name, _, _ in rows)
    return [
        f"{name:<{width}}  {option.help}  [{what + '; ' if what else ''}default: {_default(option)}]"
        for name, what, option in rows
    ]
