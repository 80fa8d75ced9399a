"""``mlxquant visualize``: pictures of the tensors in a file or folder, ours or any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import numpy as np

from .commandline.console import Command, during_command, progress, result, say
from .commandline.options import PATH, UNDERSCORES, force_option, option, verbose_option
from .contents.reader import read_contents
from .contents.views import View, views
from .errors import ArtifactError
from .files import checked
from .files.atomic import atomic_folder, claimed
from .files.checked import write_json
from .report.tensor_plots import Panel, draw_sheets, draw_tensor

SHEET, LIST = "sheet.png", "report.json"


@click.command("visualize", cls=Command, context_settings=UNDERSCORES)
@click.argument("path", type=PATH, required=False)
@option("--file-name", type=PATH, help="The same as PATH.")
@option("--weight", default="all", help="What to draw: a name or a pattern, such as '*.attn.*.codes'.")
@option("--graph", type=click.Choice(["histogram", "matrix"]), default="histogram", help="How often, or where.")
@option("--sheet", is_flag=True, help="Many on a picture, not one.")
@option("--out", "--image-folder", "out", type=PATH, required=True, help="Folder for the pictures.")
@force_option
@verbose_option
def command(
    path: Path | None, file_name: Path | None, weight: str, graph: str, sheet: bool, out: Path, force: bool
) -> None:
    """Draw weights, codes and activations.

    PATH is what inspect reads. Of a quantized layer there are LAYER.weight and LAYER.codes, of activation statistics
    LAYER.input, of what save-weights wrote NAME.values and NAME.codes; other arrays have their names.
    """
    if path is not None and file_name is not None:
        raise click.UsageError("name one file, as PATH or with --file-name")
    path = path or file_name
    if path is None:
        raise click.UsageError("name a file or folder, as PATH or with --file-name")
    contents = read_contents(path)
    chosen = choose(views(contents), weight, path)
    during_command(claimed(out, force))
    with atomic_folder(out, force) as folder:
        if sheet:
            panels = [panel(view, graph) for view in progress(chosen, "tensors")]
            files = [file.name for file in draw_sheets(panels, folder / SHEET)]
        else:
            files = file_names([view.name for view in chosen], graph)
            for view, name in progress(list(zip(chosen, files, strict=True)), "pictures"):
                draw_tensor(panel(view, graph), folder / name)
        facts = {"graph": graph, "files": files, "tensors": [{"name": view.name, "kind": view.kind} for view in chosen]}
        write_json(folder / LIST, "tensor-pictures", {**facts, "of": contents.kind, **checked.versions()})
    say(
        f"{out}: {len(files)} picture{'s' if len(files) > 1 else ''} of {len(chosen)}"
        f" tensor{'s' if len(chosen) > 1 else ''}"
    )
    result({"out": str(out), **facts})


def choose(found: Sequence[View], weight: str, path: Path) -> list[View]:
    """The views that a name or a pattern means; raises ArtifactError when it means none."""
    if not found:
        raise ArtifactError(f"{path}: holds no tensors that can be drawn; 'mlxquant inspect {path}' lists what it has")
    chosen = [view for view in found if weight == "all" or fnmatchcase(view.name, weight)]
    if not chosen:
        names = ", ".join(view.name for view in found[:3])
        raise ArtifactError(f"{path}: no tensor is called {weight!r}; it has {len(found)}, such as {names}")
    return chosen


def panel(view: View, graph: str) -> Panel:
    """A view's numbers, read, with a line on what they are."""
    if graph == "matrix":
        matrix = view.matrix()
        return Panel(
            view.name, f"{view.note}; {_spread(matrix)}", view.rows, view.columns, matrix=matrix, levels=view.levels
        )
    samples = view.samples()
    values = np.concatenate([values.reshape(-1) for _, values in samples])
    note = _use(values, view.levels) if view.levels else _spread(values)
    described = note if view.kind == "activation" else f"{view.note}; {note}"
    return Panel(view.name, described, samples=samples, levels=view.levels)


def _spread(values: Any) -> str:
    """Extremes, mean and deviation of the finite values, and how many others there are."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return "no finite values"
    lost = values.size - finite.size
    text = f"{finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.3g}, deviation {finite.std():.3g}"
    return f"{text}; {lost} not finite" if lost else text


def _use(codes: Any, levels: tuple[int, int]) -> str:
    """How much of a grid is used: information in the codes, and the share at its edges."""
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    edges = np.isin(codes, levels).mean()
    return f"{abs(-(counts * np.log2(counts)).sum()):.2f} bits of information, {edges:.2%} at the edges"


def file_names(names: Sequence[str], graph: str) -> list[str]:
    """File names for tensors, distinct also where letters had to be replaced."""
    safe = ["".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-150:].lstrip(".") for name in names]
    seen: dict[str, int] = {}
    found = []
    for name in safe:
        seen[name.lower()] = number = seen.get(name.lower(), 0) + 1
        found.append(f"{name}{'' if number == 1 else f'~{number}'}.{graph}.png")
    return found


if __name__ == "__main__":
    command()
