"""``layer_temporal_analysis.json``: how each layer's range and tier change along the trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files.checked import read_json, write_json
from ..layers.tree import starred
from ..numerics.arrays import Array
from .quant_config import QuantConfig

KIND = "temporal-analysis"


def analyze(config: QuantConfig) -> dict[str, Any]:
    """Facts by layer and by stream, and the layers that switch tiers or stay at 8 bits.

    ``range`` is what a layer's codes span, the step times their number: steps of different tiers could not be compared.
    ``variation`` is its standard deviation over its mean, ``max_over_min`` its extremes, ``trend`` its Spearman
    correlation with sigma (1: the noisier the wider).
    """
    layers = {}
    for path, span in ranges(config).items():
        bits = config.plain[path].bits
        layers[path] = {
            "mean_range": float(span.mean()),
            "variation": float(span.std() / span.mean()),
            "max_over_min": float(span.max() / span.min()),
            "trend": spearman(config.sigmas, span),
            "mean_bits": float(bits.mean()),
            "switches": int(np.count_nonzero(np.diff(bits.astype(int)))),
        }
    switchers = [path for path, facts in layers.items() if facts["switches"]]
    always_a8 = [path for path, facts in config.layers.items() if facts["always_a8"]]
    return {"layers": layers, "streams": _streams(layers), "switchers": switchers, "always_a8": always_a8}


def ranges(config: QuantConfig) -> dict[str, Array]:
    """What each layer's codes span, [T]."""
    return {path: table.span for path, table in config.plain.items()}


def stream(path: str) -> str:
    """The module two levels above a layer, starred: ``blocks.*.image`` of ``blocks.0.image.attn.q_proj``."""
    return starred(".".join(path.split(".")[:-2])) or path


def _streams(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path, facts in layers.items():
        groups.setdefault(stream(path), []).append(facts)
    mean = ("mean_range", "variation", "trend", "mean_bits")
    return {
        name: {"layers": len(group), "switchers": sum(f["switches"] > 0 for f in group)}
        | {key: float(np.mean([f[key] for f in group])) for key in mean}
        for name, group in groups.items()
    }


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two series [T] with average ranks for ties; 0 when either is constant."""
    ranks = [_ranks(np.asarray(v)) for v in (a, b)]
    centred = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / scale if scale > 0 else 0.0


def _ranks(values: Array) -> Array:
    order = np.sort(values)
    ranks: Array = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") - 1) / 2
    return ranks


def write(path: Path, analysis: Mapping[str, Any], config: QuantConfig, name: str) -> None:
    """Write the analysis of a config whose file is called ``name``, with the same parents."""
    write_json(path, KIND, {"config": name, "parents": config.facts["parents"], **analysis})


def config_of(path: Path) -> str:
    """The name of the config file that an analysis is of; raises ArtifactError when it is no analysis."""
    return str(read_json(path, KIND).get("config"))
