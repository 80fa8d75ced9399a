"""The plots of the report page: matplotlib's drawings as SVG that takes its ink from the page, so that they read in
light and dark.

Panels are small and drawn one by one: the page lays them out for its width, and text keeps its size on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..numerics.arrays import Array

INK, PALE, LINE = "#010203", "#040506", "#070809"  # stand for the page's own colours
PAGE = {INK: "var(--ink)", PALE: "var(--pale)", LINE: "var(--line)"}
PALETTE = ("#3b82c4", "#e0792b", "#2f9e6e", "#b45bbf", "#a8841a", "#d1495b", "#0f9aa0", "#7a7f8c")
DOTS = 72  # one point is one pixel
HEAT = "viridis"


def colour(index: int) -> str:
    """The colour of a model by its place in the results."""
    return PALETTE[index % len(PALETTE)]


def svg(figure: Any, name: str) -> str:
    """A figure as inline SVG; ``name`` makes its ids its own. Equal figures give equal text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxquant"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|\?xml|!DOCTYPE).*?(</metadata>|\?>|>)", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    text = re.sub(r'\s+id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", text)
    for stand_in, own in PAGE.items():
        text = text.replace(stand_in, own)
    width = round(float(figure.get_figwidth()) * DOTS)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'(<svg[^>]*?) height="[^"]*"', rf'\1 style="max-width:{width}px" role="img" aria-label="{name}"', text, count=1
    )
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _panel(
    width: float, height: float, left: float = 44, bottom: float = 32, right: float = 8, top: float = 8
) -> tuple[Any, Any]:
    """A figure of so many pixels with one pair of axes in it."""
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    figure = Figure(figsize=(width / DOTS, height / DOTS), dpi=DOTS)
    axis = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axis.set_facecolor("none")
    axis.tick_params(labelsize=9.5, colors=PALE, labelcolor=PALE, length=2.5)
    axis.grid(color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(PALE)
    return figure, axis


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=10, color=PALE, labelpad=3)
    axis.set_ylabel(y, fontsize=10, color=PALE, labelpad=3)


def quality_size(points: Sequence[Mapping[str, Any]], title: str, higher_is_better: bool, name: str) -> str:
    """Quality over size. A point has ``number``, which stands beside it, ``megabytes``, ``value``, ``interval`` ([low,
    high] or None) and ``colour``; the front of those that no other beats in both is a line.
    """
    figure, axis = _panel(430, 280, left=62, bottom=38, right=22, top=12)
    front = pareto([(p["megabytes"], p["value"]) for p in points], higher_is_better)
    steps = [(points[i]["megabytes"], points[i]["value"]) for i in front]
    axis.plot(*zip(*steps, strict=True), color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, point in enumerate(points):
        x, y = point["megabytes"], point["value"]
        if point["interval"]:
            axis.plot([x, x], point["interval"], color=point["colour"], linewidth=1.4, alpha=0.7)
        filled = point["colour"] if place in front else "none"
        axis.plot(
            [x], [y], "o", color=point["colour"], markerfacecolor=filled, markersize=7.5, markeredgewidth=1.8, zorder=3
        )
        together = ", ".join(str(p["number"]) for p in points if (p["megabytes"], p["value"]) == (x, y))
        if together.split(",")[0] == str(point["number"]):  # once for points on top of each other
            axis.annotate(together, (x, y), (7, 5), textcoords="offset points", fontsize=10.5, color=INK)
    axis.margins(0.08, 0.14)
    _label(axis, "size on disk, MB", title)
    return svg(figure, name)


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Which of (size, value) no other beats: none is as small or smaller and as good or better, and better in one. By
    size.
    """
    sign = 1 if higher_is_better else -1
    sizes, values = (np.array(part) for part in zip(*((size, sign * value) for size, value in points), strict=True))
    beaten = [
        bool(((sizes <= size) & (values >= value) & ((sizes < size) | (values > value))).any())
        for size, value in zip(sizes, values, strict=True)
    ]
    return sorted((i for i in range(len(points)) if not beaten[i]), key=lambda i: (sizes[i], -values[i]))


def trajectories(sigma: Sequence[float], curves: Sequence[Mapping[str, Any]], name: str) -> str:
    """Error [S] of the latent that enters each step. A curve has ``label``, ``colour``, ``error`` and ``interval`` ([S]
    or None).
    """
    figure, axis = _panel(470, 290, left=58, bottom=38)
    steps = np.arange(len(sigma))
    for curve in curves:
        error = np.array(curve["error"], float)
        axis.plot(
            steps,
            _positive(error),
            color=curve["colour"],
            linewidth=1.6,
            marker=".",
            markersize=4,
            label=curve["label"],
        )
        if curve["interval"] and all(pair is not None for pair in curve["interval"]):
            low, high = np.array(curve["interval"], float).T
            axis.fill_between(steps, _positive(low), _positive(high), color=curve["colour"], alpha=0.18, linewidth=0)
    if any((np.array(c["error"], float) > 0).any() for c in curves):
        axis.set_yscale("log")
    axis.margins(x=0.02)
    axis.locator_params("x", integer=True)
    _label(axis, "sampler step (the last is the result)", "relative error of the latent")
    return svg(figure, name)


def _positive(values: Array) -> Array:
    """What a logarithmic axis can show; zeros leave a gap."""
    return np.where(values > 0, values, np.nan)


def along_the_model(stages: Sequence[str], curves: Sequence[Mapping[str, Any]], name: str) -> str:
    """Error of what each stage writes, mean over noise levels. A curve has ``label``, ``colour`` and ``error``
    [stages].
    """
    figure, axis = _panel(470, 270, left=58, bottom=38)
    for curve in curves:
        axis.plot(
            _positive(np.array(curve["error"], float)), color=curve["colour"], linewidth=1.6, marker="o", markersize=3.5
        )
    if any((np.array(c["error"], float) > 0).any() for c in curves):
        axis.set_yscale("log")
    every = -(-len(stages) // 12)
    axis.set_xticks(range(0, len(stages), every), [short(stages[i]) for i in range(0, len(stages), every)])
    _label(axis, "stage", "relative error")
    return svg(figure, name)


def short(stage: str) -> str:
    """A stage's name in a word: the number of a block."""
    return stage.rsplit(".", 1)[-1]


def heat(
    rows: Sequence[str],
    sigma: Sequence[float],
    errors: Sequence[Sequence[float] | None],
    limits: tuple[float, float],
    name: str,
) -> str:
    """Error [rows][T] over noise levels, from noise to picture, on a logarithmic colour scale; None leaves a
    row empty.
    """
    from matplotlib.colors import LogNorm

    names = max(len(row) for row in rows)
    left, line = 16 + 5.6 * min(names, 34), 15 if len(rows) <= 12 else 8
    figure, axis = _panel(max(300, left + 180), 40 + line * len(rows), left=left, bottom=34, top=4)
    width = len(sigma)
    values = np.array([[np.nan] * width if row is None else row for row in errors], float)[:, ::-1]
    axis.grid(False)
    axis.imshow(
        np.ma.masked_invalid(np.maximum(values, limits[0])),
        cmap=HEAT,
        norm=LogNorm(*limits),
        aspect="auto",
        interpolation="nearest",
    )
    every = 1 if len(rows) <= 12 else 4
    axis.set_yticks(range(0, len(rows), every), [rows[i][-34:] for i in range(0, len(rows), every)])
    places = sorted({0, width // 2, width - 1})
    axis.set_xticks(places, [f"{sigma[::-1][i]:.2g}" for i in places])
    _label(axis, "sigma", "")
    return svg(figure, name)


def heat_scale(limits: tuple[float, float], name: str) -> str:
    """The colours of ``heat``."""
    from matplotlib.colors import LogNorm

    figure, axis = _panel(300, 56, left=12, bottom=38, right=14, top=4)
    axis.grid(False)
    values = np.geomspace(*limits, 128)
    axis.pcolormesh(
        values, [0, 1], values[None, :-1], cmap=HEAT, norm=LogNorm(*limits), shading="flat", rasterized=True
    )
    axis.set_xscale("log")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    _label(axis, "relative error", "")
    return svg(figure, name)


def ranges(layer: Mapping[str, Any], sigma: Sequence[float], tint: str, name: str) -> str:
    """What a layer's input spans at each noise level, and what its codes can represent."""
    figure, axis = _panel(300, 170, left=42, bottom=34)
    seen, table = layer["range"], layer["table"]
    axis.fill_between(sigma, seen["low"], seen["high"], color=tint, alpha=0.3, linewidth=0)
    for edge in ("low", "high"):
        axis.plot(sigma, seen[edge], color=tint, linewidth=1.3, marker=".", markersize=3)
        if table is not None:
            axis.plot(table["sigma"], table[edge], color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    if len(sigma) > 1:
        axis.set_xlim(max(sigma), min(sigma))  # as the sampler runs
    _label(axis, "sigma", "")
    return svg(figure, name)


def codes(first: int, counts: Array, tint: str, name: str) -> str:
    """How many weights have each code, as shares of all."""
    figure, axis = _panel(300, 150, left=42, bottom=34)
    share = 100 * np.asarray(counts, float) / max(1, int(np.sum(counts)))
    axis.bar(
        np.arange(first, first + len(share)), share, width=0.85 if len(share) <= 32 else 1.0, color=tint, linewidth=0
    )
    axis.grid(axis="x", visible=False)
    axis.margins(x=0.02)
    _label(axis, "code", "%")
    return svg(figure, name)
