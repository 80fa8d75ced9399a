"""Inside a quantized model: where its error arises and grows, what its tables cover, which codes it uses.

Both models run on the reference's own latents. Each goes on from its own hidden states, so an error at a layer is what
has come together by there: a layer's output stays comparable whatever was folded into the weights before it. Only what
a layer writes differently on purpose, because a transform was folded into its rows, has no error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..api.model import Model, QuantizedModel
from ..calibration.trajectories import Calibration
from ..grids.tables import ActivationTable
from ..layers.product import QuantizedProduct
from ..layers.tree import get_module, tapped
from ..models.adapter import Adapter
from ..models.stages import Stage, State, tensors
from ..numerics.arrays import Array
from ..progress import Progress

Call = tuple[Any, ...]  # what a layer is called with
PICTURES, LEVELS = 2, 16  # that are looked at


@dataclass
class Seen:
    """One layer over the noise levels: relative error of its output, extremes of its input, and the share that its
    table clips.
    """

    error: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)

    def add(self, values: Mapping[str, mx.array]) -> None:
        for name, value in values.items():
            getattr(self, name).append(float(np.array(value)))

    def together(self, passes: int) -> None:
        """Take the last ``passes`` for one: they were at the same noise level."""
        for values, of in ((self.error, np.mean), (self.low, np.min), (self.high, np.max), (self.clipped, np.mean)):
            if values:
                values[-passes:] = [float(of(values[-passes:]))]


def layer_report(
    reference: Model, quantized: QuantizedModel, latents: Calibration, progress: Progress
) -> dict[str, Any]:
    """The facts of ``layers/<model>.json`` on ``latents``, a few pictures of the reference's: what it holds, its keys
    say.

    Noise levels ascend; errors are |y - y_ref| / |y_ref|, over tokens and pictures, guided and not; where rows cannot
    share a forward pass, averaged over the passes at a level.
    """
    stages = list(zip(reference.adapter.stages, quantized.adapter.stages, strict=True))
    found = quantized.layers
    layers = {path: found[path] for stage, _ in stages for path in sorted(found) if stage.owns(path)}
    sigmas, states = latents.batches(reference.adapter, len(latents.prompts))
    levels = list(dict.fromkeys(sigmas))
    order = [
        levels[at] for at in np.unique(np.linspace(0, len(levels) - 1, min(LEVELS, len(levels))).astype(int))[::-1]
    ]
    seen, errors = {path: Seen() for path in layers}, {stage.name: list[float]() for stage, _ in stages}
    for sigma in progress(order, "layers"):
        passes = [index for index, at in enumerate(sigmas) if at == sigma]
        for index in passes:
            exact = own = states[index]
            for stage, twin in stages:
                exact, own = _run_pair(
                    reference.adapter, quantized, (stage, twin), sigma, exact, own, seen, errors[stage.name]
                )
        for one in seen.values():
            one.together(len(passes))
        for of_stage in errors.values():
            of_stage[-len(passes) :] = [float(np.mean(of_stage[-len(passes) :]))]
    same = comparable(reference.adapter, quantized)
    return {
        "sigma": [float(np.float32(sigma)) for sigma in order],
        "stages": {"name": list(errors), "error": list(errors.values())},
        "layers": [
            _facts(
                path,
                layers[path],
                seen[path],
                path in same,
                reference.adapter,
                next(s.name for s, _ in stages if s.owns(path)),
            )
            for path in layers
        ],
        "decisions": quantized.facts.get("stages", []),
        **({"tuning": quantized.facts["tuning"]} if "tuning" in quantized.facts else {}),
    }


def _run_pair(
    adapter: Adapter,
    quantized: QuantizedModel,
    stages: tuple[Stage, Stage],
    sigma: float,
    exact: State,
    own: State,
    seen: Mapping[str, Seen],
    errors: list[float],
) -> tuple[State, State]:
    """One stage of both models, each on its own state, looking at the layers that are quantized in it; what
    they write.
    """
    outputs, inputs = [], [dict[str, Call](), dict[str, Call]()]
    paths = [path for path in seen if stages[0].owns(path)]
    for side, (which, stage, state) in enumerate(((adapter, stages[0], exact), (quantized.adapter, stages[1], own))):
        with which.clock.at(sigma), tapped(which.module, paths, partial(_keep, inputs[side])):
            outputs.append(stage.run(state))
            mx.eval(outputs[side], {path: list(call) for path, call in inputs[side].items()})
    for path in inputs[1]:
        with quantized.adapter.clock.at(sigma):
            values = _look(
                get_module(adapter.module, path), quantized.layers[path], inputs[0][path], inputs[1][path], sigma
            )
            mx.eval(values)
        seen[path].add(values)
    new = tensors(outputs[0], exact)
    errors.append(float(np.mean([np.array(relative(outputs[1][key], outputs[0][key])) for key in new])))
    return outputs[0], outputs[1]


def _keep(calls: dict[str, Call], path: str, *call: Any) -> None:
    calls[path] = call


def _look(exact: nn.Module, layer: QuantizedProduct, exact_call: Call, call: Call, sigma: float) -> dict[str, mx.array]:
    """One layer at one noise level; its values are not evaluated."""
    values = {"error": relative(layer(*call), exact(*exact_call))}
    x = layer.transformed(call[0].astype(mx.float32))
    values |= {"low": x.min(), "high": x.max()}
    if layer.table is not None:
        low, high, step = covered(layer.table, np.array([sigma], np.float32))
        margin = 0 if layer.table.at(np.array([sigma], np.float32)).log[0] else step / 2
        values["clipped"] = ((x < mx.array(low - margin)) | (x > mx.array(high + margin))).astype(mx.float32).mean()
    return values


def covered(table: ActivationTable, sigma: Array) -> tuple[Array, Array, Array]:
    """What the codes stand for at noise levels [B]: smallest and largest value [B,1] or [B,in], and the step [B,1], all
    float32; infinite where the input is not quantized.
    """
    step, shift, bits, log = table.at(sigma)
    edge = np.where(bits == 16, np.inf, 2.0 ** (bits.astype(np.float64) - 1))
    below, above = np.where(log, 0, edge) * step, np.where(log, 1, edge - 1) * step
    return (shift - below[:, None]).astype(np.float32), (shift + above[:, None]).astype(np.float32), step[:, None]


def relative(y: mx.array, exact: mx.array) -> mx.array:
    """|y - exact| / |exact|, a number that is not evaluated; 0 where both are 0."""
    exact = exact.astype(mx.float32)
    difference = mx.sqrt(mx.square(y.astype(mx.float32) - exact).sum())
    return difference / mx.maximum(mx.sqrt(mx.square(exact).sum()), 1e-30)


def comparable(adapter: Adapter, quantized: QuantizedModel) -> set[str]:
    """Quantized layers that write the same tensor as the reference's. A transform that was folded into a layer's rows
    shows in its bias, which is never quantized; a layer without one is taken to be changed where anything could have
    been folded into it.
    """
    foldable = {fold.path for edge in adapter.edges() for fold in (*edge.folds, *edge.reorders)}
    same = set()
    for path, layer in quantized.layers.items():
        exact = get_module(adapter.module, path)
        if "bias" in layer and "bias" in exact:
            unchanged = bool(mx.array_equal(layer.bias.astype(mx.float32), exact.bias.astype(mx.float32)).item())
        else:
            unchanged = path not in foldable
        if unchanged:
            same.add(path)
    return same


def _facts(path: str, layer: QuantizedProduct, seen: Seen, same: bool, adapter: Adapter, stage: str) -> dict[str, Any]:
    return {
        "path": path,
        "role": adapter.roles()[path],
        "stage": stage,
        "weight": str(layer.format),
        "activation": layer.input_bits,
        "shape": [layer.rows, layer.width],
        "bits_per_weight": layer.bits_per_weight,
        "error": seen.error if same else None,
        "range": {"low": seen.low, "high": seen.high},
        "table": None if layer.table is None else _table(layer.table),
        "clipped": seen.clipped or None,
        "codes": _codes(layer),
    }


def _table(table: ActivationTable) -> dict[str, Any]:
    low, high, step = covered(table, table.sigma)
    return {
        "sigma": table.sigma.tolist(),
        "low": _finite(low.min(1)),
        "high": _finite(high.max(1)),
        "step": step[:, 0].tolist(),
        "bits": table.bits.tolist(),
    }


def _finite(values: Array) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _codes(layer: QuantizedProduct) -> dict[str, Any]:
    """How often each code occurs, counted from the smallest."""
    zero = int(layer.format.zero_code)
    return {"first": -zero, "count": np.bincount(layer.codes().ravel(), minlength=2**layer.format.bits).tolist()}
