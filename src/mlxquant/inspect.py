"""``mlxquant inspect``: what is in a file or folder, ours or any checkpoint, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from .commandline.console import Command, result, say
from .commandline.options import PATH, option, verbose_option
from .contents.layers import bits_per_weight, without_parts
from .contents.reader import Contents, read_contents
from .contents.tables import array_rows, fact_lines, grouped, layer_rows, lines, size


@click.command("inspect", cls=Command)
@click.argument("path", type=PATH)
@option(
    "--each", is_flag=True, help="A line for every layer and array, not one for all that differ only by their numbers."
)
@verbose_option
def command(path: Path, each: bool) -> None:
    """Show what is in a model, a checkpoint or a file.

    PATH is a file or folder that mlxquant wrote, or any checkpoint. Listed are layers, formats, shapes and what it was
    made from; checksums are verified on the way. Weights are not loaded.
    """
    contents = read_contents(path)
    layers, arrays = layer_rows(contents), array_rows(without_parts(contents.arrays, contents.layers))
    facts = figures(contents)
    say(f"{contents.path}: {contents.kind}")
    for line in (*fact_lines({**contents.facts, **summary(facts), "checked": checked(contents)}), *contents.notes):
        say(line)
    for rows in (layers, arrays):
        if rows:
            say("")
            for line in lines(rows if each else grouped(rows)):
                say(line)
    result(
        {
            **facts,
            "facts": contents.facts,
            "layers": layers,
            "arrays": arrays,
            "files": contents.checks,
            "notes": contents.notes,
        }
    )


def figures(contents: Contents) -> dict[str, Any]:
    """Counts and sizes: ``bytes`` of all arrays, ``bits_per_weight`` of all that is stored, where it is a model's, and
    of the quantized layers alone.
    """
    layers = contents.layers
    weights = sum(layer.weights for layer in layers)
    model = any(array.name.endswith(".weight") for array in contents.arrays)
    return {
        "path": str(contents.path),
        "kind": contents.kind,
        "arrays_count": len(contents.arrays),
        "layers_count": len(layers),
        "bytes": sum(array.nbytes for array in contents.arrays),
        "bits_per_weight": bits_per_weight(contents.arrays, layers) if model else None,
        "bits_per_quantized_weight": sum(layer.bits_per_weight * layer.weights for layer in layers) / weights
        if weights
        else None,
        "dtypes": dict(sorted(Counter(array.dtype for array in contents.arrays).items())),
    }


def summary(facts: dict[str, Any]) -> dict[str, str]:
    """The figures in words."""
    if not facts["arrays_count"]:
        return {}
    text = f"{facts['arrays_count']} arrays, {size(facts['bytes'])}"
    if facts["bits_per_weight"] is not None:
        text += f", {facts['bits_per_weight']:.2f} bits per weight"
    if facts["bits_per_quantized_weight"] is not None:
        text += f" ({facts['bits_per_quantized_weight']:.2f} in {facts['layers_count']} quantized layers)"
    return {"stored": text}


def checked(contents: Contents) -> str:
    """How many files were checked by what."""
    how = {"sha256": "sha256 right", "crc32": "CRC-32 right", "layout": "layout right, nothing vouches for the values"}
    counts = Counter(contents.checks.values())
    return "; ".join(f"{n} file{'s' if n > 1 else ''}: {how[name]}" for name, n in counts.items())


if __name__ == "__main__":
    command()
