"""The layers of the report page: their errors over time, their inputs' ranges with the tables that were fitted, their
codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..layers.tree import starred
from . import page_plots as plots
from .page_tables import dot, legend, plain

Json = Mapping[str, Any]
SHOWN = 12  # ranges of so many layers a model


def kind(path: str) -> str:
    """A layer's path with its numbers starred, without what stands before the block's number."""
    name = starred(path)
    return name.split("*.", 1)[1] if "*." in name and not name.startswith("*.") else name


def section(report: Json, layers: Mapping[str, Json]) -> str:
    """One part for all models, then one a model."""
    models = [(place, model["name"]) for place, model in enumerate(report["results"]) if model["name"] in layers]
    if not models:
        return '<p class="hint">No layers: these pictures came without models that mlxquant quantized.</p>'
    limits = _limits([layer["error"] for name in layers for layer in layers[name]["layers"]])
    parts = [_along(models, layers)]
    for number, (place, name) in enumerate(models):
        own, tint = layers[name], plots.colour(place)
        body = (
            _heat(own, limits, f"heat-{place}")
            + _ranges(own, tint, f"range-{place}")
            + _codes(own, tint, f"code-{place}")
        )
        parts.append(
            f"<details{'' if number else ' open'}><summary>{dot(tint)}{escape(name)}</summary>{body}</details>"
        )
    return "".join(parts)


def _limits(errors: Sequence[Sequence[float] | None]) -> tuple[float, float]:
    """Whole decades around what is to be shown, at least one and at most four."""
    values = np.array([value for row in errors if row is not None for value in row if value > 0])
    if not len(values):
        return 1e-3, 1.0
    high = float(np.ceil(np.log10(values.max()) - 1e-9))
    low = max(float(np.floor(np.log10(values.min()))), high - 4)
    return 10 ** min(low, high - 1), 10**high


def _along(models: Sequence[tuple[int, str]], layers: Mapping[str, Json]) -> str:
    curves = [
        {
            "label": name,
            "colour": plots.colour(place),
            "error": [float(np.mean(row)) for row in layers[name]["stages"]["error"]],
        }
        for place, name in models
        if layers[name]["stages"]["error"] is not None
    ]
    if not curves:
        return ""
    stages = layers[models[0][1]]["stages"]["name"]
    drawn = plots.along_the_model(stages, curves, "along-the-model")
    names = legend([(name, plots.colour(place)) for place, name in models])
    caption = (
        "Relative error of what each stage writes, mean over noise levels, on the reference's latents: how error grows"
        " along the model."
    )
    return f"<h3>From stage to stage</h3>{names}<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _groups(layers: Sequence[Json]) -> dict[str, list[Json]]:
    """Layers of the same kind together; those that are the only one of theirs under one name."""
    groups: dict[str, list[Json]] = {}
    for layer in layers:
        groups.setdefault(kind(layer["path"]), []).append(layer)
    single = [name for name, some in groups.items() if len(some) == 1]
    alone = [layer for name in single for layer in groups.pop(name)]
    return groups | ({"single layers": alone} if alone else {})


def _row_names(layers: Sequence[Json]) -> list[str]:
    """What tells layers of a kind apart: the numbers of their blocks, or their paths."""
    numbers = [re.findall(r"\b\d+\b", layer["path"]) for layer in layers]
    alike = len({kind(layer["path"]) for layer in layers}) == 1
    return [found[0] for found in numbers] if alike and all(numbers) else [layer["path"] for layer in layers]


def _heat(own: Json, limits: tuple[float, float], name: str) -> str:
    figures = []
    for place, (title, some) in enumerate(_groups(own["layers"]).items()):
        shown = [layer["error"] for layer in some]
        if all(row is None for row in shown):
            continue
        values = [value for row in shown if row is not None for value in row]
        drawn = plots.heat(_row_names(some), own["sigma"], shown, limits, f"{name}-{place}")
        caption = f"<b>{escape(title)}</b> mean {plain(float(np.mean(values)))}, largest {plain(float(np.max(values)))}"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>")
    if not figures:
        return ""
    hint = (
        "Relative error of each layer's output on the latents of the reference: a row a block, from noise (left) to"
        " picture (right)."
    )
    if any(layer["error"] is None for layer in own["layers"]):
        hint += " Empty rows: a division was folded into the layer, so its output is another tensor on purpose."
    scale = plots.heat_scale(limits, f"{name}-scale")
    title = "<h3>Error by layer and noise level</h3>"
    return f'{title}<p class="hint">{hint}</p><figure>{scale}</figure><div class="panels">{"".join(figures)}</div>'


def _mean(values: Sequence[float] | None) -> float:
    return float(np.mean(values)) if values else 0.0


def _ranges(own: Json, tint: str, name: str) -> str:
    fitted = [layer for layer in own["layers"] if layer["table"] is not None]
    if not fitted:
        return '<h3>Ranges of the inputs</h3><p class="hint">Inputs are not quantized.</p>'
    shown = sorted(fitted, key=lambda layer: -_mean(layer["error"]))[:SHOWN]
    figures = []
    for place, layer in enumerate(shown):
        bits = sorted(set(layer["table"]["bits"]))
        span = f"A{bits[0]}" if len(bits) == 1 else f"A{bits[0]} to A{bits[-1]}"
        caption = f"<b>{escape(layer['path'])}</b> {span}; {_mean(layer['clipped']):.2%} clipped"
        figures.append(
            f"<figure><figcaption>{caption}</figcaption>"
            f"{plots.ranges(layer, own['sigma'], tint, f'{name}-{place}')}</figure>"
        )
    which = f"The {len(shown)} of {len(fitted)} layers" if len(shown) < len(fitted) else "All layers"
    order = ", those of the largest error" if len(shown) < len(fitted) else ""
    hint = f"{which} with quantized inputs{order}. Area: what was seen. Dashes: what the codes can represent."
    return f'<h3>Ranges of the inputs</h3><p class="hint">{hint}</p><div class="panels">{"".join(figures)}</div>'


def _codes(own: Json, tint: str, name: str) -> str:
    groups: dict[tuple[str, str], list[Json]] = {}
    for layer in own["layers"]:
        groups.setdefault((kind(layer["path"]), layer["weight"]), []).append(layer)
    figures = []
    for place, ((title, weight), some) in enumerate(groups.items()):
        counts = np.sum([layer["codes"]["count"] for layer in some], axis=0)
        share = counts[counts > 0] / counts.sum()
        entropy = -float((share * np.log2(share)).sum())
        edges = float((counts[0] + counts[-1]) / counts.sum())
        many = f"{len(some)} layers, " if len(some) > 1 else ""
        caption = (
            f"<b>{escape(title)}</b> {many}{escape(weight)}; {abs(entropy):.2f} bits of information, {edges:.2%} at the"
            " edges"
        )
        drawn = plots.codes(some[0]["codes"]["first"], counts, tint, f"{name}-{place}")
        figures.append(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>")
    hint = "How many weights have each code. Codes far from the edges waste bits, many at the edges are clipped."
    return f'<h3>Codes of the weights</h3><p class="hint">{hint}</p><div class="panels">{"".join(figures)}</div>'
