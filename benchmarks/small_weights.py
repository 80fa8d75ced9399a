"""What small weights lose, and what 16-bit inputs cost a packed kernel: ``python benchmarks/small_weights.py``.

Rows of random weights, each as small as it says, in one layer: the worst relative error of a row with our scales, with
scales that are clamped to float16's normal numbers (as releases up to 0.2.0 had them), and of ``mx.quantize`` with
groups of 128. Then the output error of MLX's packed kernel by the dtypes of input and scales, against float64, beside
the rounding of the output alone. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np

from mlxquant.grids.weights import SMALLEST_HALF, Grid, WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear

SIZES = (1.0, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FORMATS = ("w8", "w4", "w8-asym", "w4-g32")
ROWS, WIDTH = 64, 512


def clamped(weight: np.ndarray, format: WeightFormat) -> Grid:
    """The grid of releases up to 0.2.0."""
    grid = fit_extremes(weight, format)
    scales = np.maximum(grid.scales, np.float32(SMALLEST_HALF))
    biases = -format.zero_code * scales if format.symmetric else grid.biases.astype(np.float16).astype(np.float32)
    return Grid(format, scales, biases)


def worst(found: np.ndarray, weight: np.ndarray) -> float:
    return float((np.linalg.norm(found - weight, axis=1) / np.linalg.norm(weight, axis=1)).max())


def small_rows() -> dict[str, dict[str, list[float]]]:
    """By size of the largest weight of a row and format: ours, clamped, MLX's."""
    rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    rows /= np.abs(rows).max(1, keepdims=True)
    table: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        weight, table[f"{size:g}"] = rows * np.float32(size), {}
        for text in FORMATS:
            format = WeightFormat.parse(text)
            errors = [
                worst(grid.dequantize(grid.quantize(weight)), weight)
                for grid in (fit_extremes(weight, format), clamped(weight, format))
            ]
            setting = {"group_size": 32 if "g32" in text else 128, "bits": format.bits}
            packed = mx.quantize(mx.array(weight), **setting)
            table[f"{size:g}"][text] = [*errors, worst(np.array(mx.dequantize(*packed, **setting)), weight)]
    return table


def packed_inputs() -> dict[str, list[float]]:
    """By dtype of the input: relative output error with scales in that dtype, in float32, and of the rounding alone."""
    weight = np.random.default_rng(1).standard_normal((256, WIDTH)).astype(np.float32) * 0.02
    grid = fit_extremes(weight, WeightFormat(8))
    layer = QuantizedLinear(grid.quantize(weight), grid)
    exact, table = grid.dequantize(layer.codes()).astype(np.float64), {}
    for dtype in (mx.bfloat16, mx.float16):
        x = mx.random.normal((64, WIDTH), key=mx.random.key(0)).astype(dtype)
        wanted = np.array(x.astype(mx.float32)).astype(np.float64) @ exact.T
        found = []
        for inner in (dtype, mx.float32):
            scales, biases = (v.astype(inner) for v in layer.packed_scales())
            setting = {"group_size": layer.packed_group, "bits": 8}
            found.append(mx.quantized_matmul(x.astype(inner), layer.weight, scales, biases, **setting).astype(dtype))
        found.append(mx.array(wanted.astype(np.float32)).astype(dtype))
        table[str(dtype).removeprefix("mlx.core.")] = [
            float(np.linalg.norm(np.array(y.astype(mx.float32)) - wanted) / np.linalg.norm(wanted)) for y in found
        ]
    return table


def main() -> None:
    rows, inputs = small_rows(), packed_inputs()
    print("largest weight | " + " | ".join(f"{text}: ours, clamped, mx.quantize" for text in FORMATS))
    for size, found in rows.items():
        print(f"{size} | " + " | ".join(", ".join(f"{error:.2%}" for error in found[text]) for text in FORMATS))
    for dtype, (narrow, wide, output) in inputs.items():
        print(
            f"w8, inputs and scales {dtype}: {narrow:.2%}; in float32: {wide:.2%}; the output's rounding: {output:.2%}"
        )
    print(json.dumps({"rows": rows, "inputs": inputs}))


if __name__ == "__main__":
    main()
