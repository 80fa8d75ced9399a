"""How far the native parts of picture models are from diffusers' and transformers': the largest absolute difference of
each output, in float32, on tiny random configurations that are written as folders of the hub.

The same cases are tests; here they become a table. Needs ``pip install 'mlxquant[diffusers]'``, after a CPU build of
torch. People read the table on stderr; the last line of stdout is JSON.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import click

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import parts_reference, pixart_reference, sd3_reference, unet_reference

Differences = Callable[[Path, str], Mapping[str, float]]
GROUPS: dict[str, tuple[Mapping[str, object], Differences]] = {  # cases by name, and what measures one in a folder
    "parts": (parts_reference.CASES, parts_reference.differences),
    "pixart": (pixart_reference.CASES, pixart_reference.differences),  # of pipelines of the largest value
    "sd3": (sd3_reference.CASES, sd3_reference.differences),  # of the largest value
    "sd15": (unet_reference.CASES, unet_reference.differences),  # likewise
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(list(GROUPS)), help="Groups of cases; by default all.")
def command(only: tuple[str, ...]) -> None:
    """Print a table: part and configuration, and the largest difference of each output."""
    warnings.simplefilter("ignore")  # torch's arrays in NumPy 2, transformers' deprecations
    rows = []
    click.echo("| case | largest difference |\n|---|---|", err=True)
    for group in only or GROUPS:
        cases, differences = GROUPS[group]
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                found = differences(Path(folder), case)
            rows.append({"group": group, "case": case, "differences": dict(found)})
            told = ", ".join(f"{name} {value:.1e}" if value else f"{name} 0" for name, value in found.items())
            click.echo(f"| {case} | {told} |", err=True)
    import diffusers
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (diffusers, transformers, torch)}
    machine = f"{platform.machine()} {platform.system()}, mlx {mx.__version__}"
    click.echo(json.dumps({"machine": machine, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    command()
