"""The picture of activation ranges over time: what one static scale would have to span, and what a scale a timestep has
to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..files.atomic import atomic_file
from ..numerics.arrays import Array

PER_PAGE, COLUMNS = 24, 4
BAND, EDGE, EXTREME, PALE, GRID = "#9db8d9", "#3f6ea8", "#c8643c", "#6a6a70", "#e6e6ea"


@dataclass(frozen=True)
class RangeCurves:
    """A tensor's range over ``sigma`` [T] ascending: ``low`` and ``high`` [T] averaged over batches, ``least`` and
    ``most`` [T] of all.
    """

    sigma: Array
    low: Array
    high: Array
    least: Array
    most: Array


def draw_ranges(curves: Mapping[str, RangeCurves], path: Path) -> list[Path]:
    """Write one panel a layer as a PNG at ``path``, or, where they are too many, as pages beside it: ``ranges-1.png``,
    ``ranges-2.png``.

    Layers are dotted paths. Returns the files; raises ArtifactError where they cannot be written.
    """
    layers = list(curves)
    pages = [layers[start : start + PER_PAGE] for start in range(0, len(layers), PER_PAGE)]
    files = (
        [path] if len(pages) == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(pages) + 1)]
    )
    for file, page in zip(files, pages, strict=True):
        _draw_page({layer: curves[layer] for layer in page}, _common(layers), file)
    return files


def _common(layers: list[str]) -> str:
    """The dotted parts that all paths start with, their last two apart."""
    levels = zip(*(layer.split(".")[:-2] for layer in layers), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


def _draw_page(curves: Mapping[str, RangeCurves], common: str, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    height = 1.75 * rows + 1.1
    figure = Figure(figsize=(3.3 * columns + 0.4, height), dpi=110, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.5 / height), h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, (layer, curve) in zip(axes, curves.items(), strict=False):
        _draw_panel(axis, layer.removeprefix(f"{common}."), curve)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(curves) - columns) : len(curves)]:
        axis.set_xlabel("sigma", fontsize=8, color=PALE)
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    anchor = (0, 1 - 0.22 / height)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=anchor, ncols=2, frameon=False, fontsize=8.5)
    figure.text(
        0.008, 1 - 0.1 / height, "Input ranges over time" + (f"  ({common})" if common else ""), fontsize=11, va="top"
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_panel(axis: Any, layer: str, curve: RangeCurves) -> None:
    *block, kind, name = ["", *layer.split(".")]
    axis.fill_between(
        curve.sigma, curve.low, curve.high, color=BAND, alpha=0.75, linewidth=0, label="mean of the batches' ranges"
    )
    for edge in (curve.low, curve.high):
        axis.plot(curve.sigma, edge, color=EDGE, linewidth=1.1, marker=".", markersize=3)
    for extreme, label in ((curve.least, "extremes of all pictures"), (curve.most, None)):
        axis.plot(curve.sigma, extreme, color=EXTREME, linewidth=1.0, linestyle=(0, (3, 1.5)), label=label)
    axis.set_title(f"{kind}.{name}".strip("."), fontsize=9, loc="left", pad=3, parse_math=False)
    axis.set_title(".".join(block).strip("."), fontsize=6.5, loc="right", pad=3, color=PALE, parse_math=False)
    axis.tick_params(labelsize=7, colors=PALE, length=2)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(x=0.02, y=0.08)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(PALE)
