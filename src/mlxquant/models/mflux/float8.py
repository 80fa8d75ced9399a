"""Layers whose weights are 8-bit floats, as Ideogram 4 has them: no ``nn.Linear``, so nobody would find them.

For the calibration each is opened: a Linear with the same weights stands in its place. What is not quantized by the end
is what it was again, for mflux reads nothing else there.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...layers.tree import set_module

ROW_SCALE = "weight_scale"


def find_float8(module: nn.Module) -> dict[str, nn.Module]:
    """Layers with 8-bit floats and a scale for each row, by path."""
    return {
        path: part
        for path, part in module.named_modules()
        if ROW_SCALE in part and "weight" in part and part.weight.dtype == mx.uint8
    }


def open_float8(module: nn.Module, dtype: mx.Dtype) -> dict[str, nn.Module]:
    """Put a Linear in the place of every layer with 8-bit floats, and return those by path.

    Args:
        module: What holds the layers; it is changed.
        dtype: Of the weights, in which the module computes.
    """
    found = find_float8(module)
    for path, layer in found.items():
        set_module(module, path, _linear(layer, dtype))
    return found


def close_float8(module: nn.Module, opened: Mapping[str, nn.Module]) -> None:
    """Put back what is still a Linear."""
    now = dict(module.named_modules())
    for path, layer in opened.items():
        if type(now[path]) is nn.Linear:
            set_module(module, path, layer)


def _linear(layer: nn.Module, dtype: mx.Dtype) -> nn.Linear:
    bias = layer.get("bias")
    linear = nn.Linear(1, 1, bias=bias is not None)
    linear.weight = mx.from_fp8(layer.weight, dtype=dtype) * layer[ROW_SCALE].astype(dtype)[:, None]
    if bias is not None:
        linear.bias = bias
    return linear
