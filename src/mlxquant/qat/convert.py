"""Make a GPT one that learns quantized: put quantizing layers, and points at which activations are rounded, where the
options say.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..layers.tree import get_module, set_module
from ..models.gpt.network import GPT
from .modules import ROW, QuantizingEmbedding, QuantizingLinear, QuantizingPoint, Site
from .options import EMBEDDINGS, POINTS, PROJECTIONS, TOKEN, QuantizationOptions
from .ramp import Ramp


def quantize_while_training(
    model: GPT, options: QuantizationOptions, seed: int = 0, dtype: mx.Dtype = mx.float32
) -> Ramp:
    """Replace in place what the options quantize; the returned ramp says when, and stands after training until an
    iteration is set.

    ``seed`` is that of stochastic rounding, ``dtype`` that of the activations. The parameters keep their names and
    their values.
    """
    ramp = Ramp(options["quantization_warmup_iters"], options["full_quant_iteration"], seed)
    for number, block in enumerate(model.layers):
        _quantize_block(block, f"model.h.{number}", options, ramp)
    for name in EMBEDDINGS:
        if (quantizer := options.embedding(name)) is not None:
            path = f"model.{name}"
            set_module(model, path, QuantizingEmbedding(get_module(model, path), quantizer, Site(path, ramp), dtype))
    return ramp


def _quantize_block(block: nn.Module, place: str, options: QuantizationOptions, ramp: Ramp) -> None:
    for path in dict.fromkeys(projection.path for projection in PROJECTIONS.values()):
        names = [name for name, projection in PROJECTIONS.items() if projection.path == path]
        quantizers = [options.projection(name) for name in sorted(names, key=lambda name: PROJECTIONS[name].part)]
        if any(quantizers):
            set_module(
                block, path, QuantizingLinear(get_module(block, path), quantizers, Site(f"{place}.{path}", ramp))
            )
    _put_points(block, place, options, ramp)


def put_points(model: GPT, options: QuantizationOptions) -> None:
    """Round activations where the options say, as after training, and leave the layers as they are."""
    for number, block in enumerate(model.layers):
        _put_points(block, f"model.h.{number}", options, Ramp())


def _put_points(block: nn.Module, place: str, options: QuantizationOptions, ramp: Ramp) -> None:
    axes = ROW if options["activations_quant_scale"] == TOKEN else None
    for group, points in POINTS.items():
        for point in points:
            if (quantizer := options.activation(group, point)) is not None:
                path = f"{group}.{point}"
                site = Site(f"{place}.{path}", ramp)
                set_module(block, path, QuantizingPoint(quantizer, site, axes, options["store_activations"]))


def quantizing_points(model: nn.Module) -> dict[str, QuantizingPoint]:
    """Every point at which an activation is rounded, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizingPoint)}


def kept_activations(model: nn.Module) -> dict[str, mx.array]:
    """What the points kept, as ``path.codes`` and so on, see ``Coded.stored``."""
    points = quantizing_points(model).items()
    return {f"{path}.{name}": value for path, point in sorted(points) for name, value in point.kept.items()}


def restore_activations(model: nn.Module, kept: dict[str, mx.array]) -> None:
    """The inverse of ``kept_activations``."""
    for path, point in quantizing_points(model).items():
        own = {name.removeprefix(f"{path}."): value for name, value in kept.items() if name.startswith(f"{path}.")}
        point.restore(own)
