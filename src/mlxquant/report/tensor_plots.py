"""Pictures of tensors: how often each value is there, and where. One tensor a picture, or many on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import atomic_file
from ..numerics.arrays import Array

BAR, PALE, GRID = "#3f6ea8", "#6a6a70", "#e6e6ea"
BINS, CELLS = 128, 1024  # bars of a histogram; cells of a heat map, each way
PER_SHEET, COLUMNS = 24, 4
SIGNED, POSITIVE, TIME = "RdBu_r", "magma", "viridis"


@dataclass(frozen=True)
class Panel:
    """What to draw of a tensor: ``samples`` are numbers with labels for a histogram, ``matrix`` [rows, columns] is for
    a heat map.

    ``levels``: the first and last code, where values are codes.
    """

    title: str
    note: str
    rows: str = ""
    columns: str = ""
    matrix: Array | None = None
    samples: Sequence[tuple[str, Array]] = ()
    levels: tuple[int, int] | None = None


def draw_tensor(panel: Panel, path: Path) -> Path:
    """Write one tensor's picture as a PNG; raises ArtifactError where it cannot be written."""
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    figure = Figure(
        figsize=(7.2, 4.4 if panel.matrix is None else 5.4), dpi=110, facecolor="white", layout="constrained"
    )
    _draw(figure, figure.subplots(), panel, large=True)
    return _save(figure, path)


def draw_sheets(panels: Sequence[Panel], path: Path) -> list[Path]:
    """Write many small pictures on one PNG, or, where they are too many, on pages: ``sheet-1.png``, ``sheet-2.png``."""
    from matplotlib.figure import Figure

    pages = [panels[start : start + PER_SHEET] for start in range(0, len(panels), PER_SHEET)]
    files = (
        [path] if len(pages) == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(pages) + 1)]
    )
    for file, page in zip(files, pages, strict=True):
        columns = min(COLUMNS, len(page))
        rows = -(-len(page) // columns)
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=110, facecolor="white", layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, page, strict=False):
            _draw(figure, axis, panel, large=False)
        for axis in axes[len(page) :]:
            axis.set_visible(False)
        _save(figure, file)
    return files


def _save(figure: Any, path: Path) -> Path:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw(figure: Any, axis: Any, panel: Panel, large: bool) -> None:
    if panel.matrix is None:
        _histogram(axis, panel, large)
    else:
        _heat_map(figure, axis, panel, panel.matrix, large)
    title, length = panel.title, 84 if large else 44
    shown = title if len(title) <= length else f"…{title[1 - length :]}"
    text = f"{shown}\n{panel.note}" if large else shown
    axis.set_title(text, fontsize=9.5 if large else 7, loc="left", pad=4, parse_math=False)  # a name may have a $
    axis.tick_params(labelsize=8 if large else 6.5, colors=PALE, length=2)
    for side in axis.spines.values():
        side.set_color(PALE)


def _histogram(axis: Any, panel: Panel, large: bool) -> None:
    """Counts over values, logarithmic where they span more than three decades, so that the tails are seen."""
    finite = [(label, values[np.isfinite(values)].astype(np.float64)) for label, values in panel.samples]
    everything = [values for _, values in finite if len(values)]
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if not everything:
        axis.text(0.5, 0.5, "no finite values", transform=axis.transAxes, ha="center", color=PALE)
        return
    if panel.levels is not None:
        _code_bars(axis, everything[0], panel.levels)
    else:
        low, high = min(float(v.min()) for v in everything), max(float(v.max()) for v in everything)
        edges = np.linspace(low, high, BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, BINS + 1)
        for place, (label, values) in enumerate(finite):
            counts = np.histogram(values, edges)[0]
            if len(finite) == 1:
                axis.stairs(counts, edges, fill=True, color=BAR)
                axis.axvline(0, color=PALE, linewidth=0.6)
            else:
                axis.stairs(counts, edges, color=_shade(place, len(finite)), linewidth=1.1, label=label)
        if (largest := max(np.histogram(v, edges)[0].max() for v in everything)) > 1000:
            axis.set_yscale("log")
            axis.set_ylim(0.7, 1.6 * largest)
    if len(finite) > 1 and large:
        axis.legend(fontsize=7.5, frameon=False, ncols=1 if len(finite) <= 12 else 2)
    if large:
        axis.set_xlabel("code" if panel.levels else "value", fontsize=8.5, color=PALE)
        axis.set_ylabel("count", fontsize=8.5, color=PALE)


def _code_bars(axis: Any, values: Array, levels: tuple[int, int]) -> None:
    first, last = levels
    counts = np.bincount(values.astype(np.int64) - first, minlength=last - first + 1)
    axis.bar(np.arange(first, last + 1), counts, width=0.85 if len(counts) <= 32 else 1.0, color=BAR, linewidth=0)
    axis.set_xlim(first - 0.7, last + 0.7)


def _shade(place: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps[TIME](0.92 * place / max(1, count - 1))


def _heat_map(figure: Any, axis: Any, panel: Panel, matrix: Array, large: bool) -> None:
    """Values by place. Many cells become one with the value of the largest magnitude among them, so that outliers are
    not lost.
    """
    image = pooled(matrix, CELLS if large else CELLS // 4)
    finite = image[np.isfinite(image)]
    norm = scale(finite if len(finite) else np.zeros(1), panel.levels)
    extent = (-0.5, matrix.shape[1] - 0.5, matrix.shape[0] - 0.5, -0.5)
    colours = SIGNED if norm.vmin < 0 else POSITIVE
    drawn = axis.imshow(image, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    beyond = len(finite) and (finite.max() > norm.vmax or finite.min() < norm.vmin)
    bar = figure.colorbar(drawn, ax=axis, pad=0.015, fraction=0.05, extend="both" if beyond else "neither")
    bar.ax.tick_params(labelsize=8 if large else 6, colors=PALE, length=2)
    if large:
        axis.set_xlabel(panel.columns, fontsize=8.5, color=PALE)
        axis.set_ylabel(panel.rows, fontsize=8.5, color=PALE)


def scale(values: Array, levels: tuple[int, int] | None) -> Any:
    """The colours' scale: around zero for codes and for values of both signs, whose last half percent is beyond it;
    logarithmic for positive values that span more than two decades.
    """
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(values.min()), float(values.max())
    if levels is not None:
        return Normalize(-max(-levels[0], levels[1]), max(-levels[0], levels[1]))
    if low < 0:
        edge = float(np.percentile(np.abs(values), 99.5)) or max(-low, high)
        return Normalize(-edge, edge)
    return LogNorm(low, high) if 0 < 100 * low < high else Normalize(low, high if high > low else low + 1)


def pooled(matrix: Array, cells: int) -> Array:
    """A matrix with at most ``cells`` rows and columns: of each block of cells the one of the largest magnitude, NaN
    where there is one.
    """
    for axis in (0, 1):
        length = matrix.shape[axis]
        if length <= cells:
            continue
        starts = np.unique(np.linspace(0, length, cells, endpoint=False).astype(int))
        most, least = np.maximum.reduceat(matrix, starts, axis=axis), np.minimum.reduceat(matrix, starts, axis=axis)
        matrix = np.where(-least > most, least, most)
    return matrix
