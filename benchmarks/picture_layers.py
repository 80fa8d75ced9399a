"""Layers of convolutional networks on the CPU, ours against MLX's own: group normalisation (error against float64, and
time), SiLU, and convolutions by the size of the strips that they are unfolded in.

Sizes are those of SD1.5's UNet (64 x 64 x 320) and of its autoencoder at 512 x 512 pixels. CPU seconds, the least of
three. People read stderr; the last line of stdout is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import click
import numpy as np

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.fast_cpu import group_norm, silu
from mlxquant.numerics import convolution

SIZES = ((64, 320), (64, 512), (256, 256), (512, 128))
STRIPS = (2**22, 2**24, 2**27, 2**40)  # bytes; the last is the whole at once
GROUPS, EPSILON = 32, 1e-6


def seconds(function: Callable[[], mx.array]) -> float:
    mx.eval(function())
    taken = []
    for _ in range(3):
        start = time.process_time()
        mx.eval(function())
        taken.append(time.process_time() - start)
    return min(taken)


def error(found: mx.array, x: mx.array) -> float:
    """The largest difference from the same normalisation in float64."""
    grouped = np.array(x).astype(np.float64).reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    exact = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape)
    return float(np.abs(np.array(found) - exact).max())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="The smallest size alone.")
def command(quick: bool) -> None:
    """Print a row a size."""
    rows = []
    for side, channels in SIZES[: 1 if quick else None]:
        mx.random.seed(0)
        x = mx.random.normal((1, side, side, channels)) + 0.5
        kernel, zeros = mx.random.normal((channels, 3, 3, channels)) * 0.02, mx.zeros(channels)
        ones = mx.ones(channels)
        mx.eval(x, kernel, zeros, ones)
        own = nn.GroupNorm(GROUPS, channels, eps=EPSILON, pytorch_compatible=True)
        functions: dict[str, Callable[[], mx.array]] = {
            "MLX's GroupNorm": lambda own=own, x=x: own(x),
            "group_norm": lambda x=x, w=ones, b=zeros: group_norm(x, w, b, GROUPS, EPSILON),
            "MLX's silu": lambda x=x: nn.silu(x),
            "silu": lambda x=x: silu(x),
        }
        row: dict[str, object] = {"size": f"{side} x {side} x {channels}"}
        row |= {f"{name}, error": error(functions[name](), x) for name in list(functions)[:2]}
        row |= {f"{name}, s": round(seconds(function), 4) for name, function in functions.items()}
        before = convolution.UNFOLDED_BYTES
        for limit in STRIPS:
            convolution.UNFOLDED_BYTES = limit
            taken = seconds(lambda x=x, k=kernel, b=zeros: convolution.convolved(x, k, b, 1, (1, 1)))
            row[f"convolution in strips of 2**{limit.bit_length() - 1}, s"] = round(taken, 3)
        convolution.UNFOLDED_BYTES = before
        rows.append(row)
        click.echo("\n".join(f"{name}: {value}" for name, value in row.items()) + "\n", err=True)
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    command()
