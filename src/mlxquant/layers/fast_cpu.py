"""GELU, SiLU, group normalisation and attention that are exact and also fast on the CPU.

MLX evaluates ``erf`` and ``exp`` one scalar at a time on x86 and spends more time in GELU and softmax than in the
matmuls around them; its normalisations lose digits where they sum over a million values. Rational and polynomial
approximations, compiled into vectorised loops, agree with the exact functions to a few 1e-6 and are several times
faster. Metal keeps MLX's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
_E = tuple(0.6065306597126334 * (-1.0) ** n / math.factorial(n) for n in range(8, -1, -1))


def _horner(coefficients: tuple[float, ...], z: mx.array) -> mx.array:
    total = mx.array(coefficients[0], dtype=z.dtype)
    for c in coefficients[1:]:
        total = total * z + c
    return total


def _normal_cdf(x: mx.array) -> mx.array:
    x = mx.clip(x * 0.7071067811865476, -4.0, 4.0)
    z = x * x
    return 0.5 + 0.5 * x * _horner(_P, z) / _horner(_Q, z)


def _exp_minus(z: mx.array) -> mx.array:
    """exp(-z) for z >= 0, as exp(-z/32)^32; z is cut at 32, where it is 1e-14."""
    root = _horner(_E, mx.minimum(z * (1 / 32), 1.0) - 0.5)
    for _ in range(5):
        root = root * root
    return root


def _normal_pdf(x: mx.array) -> mx.array:
    return 0.3989422804014327 * _exp_minus(0.5 * x * x)


def _is_fast(x: mx.array) -> bool:
    """Whether these approximations are for x: MLX's own functions are better on Metal and in half precision."""
    return bool(x.dtype == mx.float32 and mx.default_device() == mx.cpu)


def _with_slope(
    forward: Callable[[mx.array], mx.array], slope: Callable[[mx.array, mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """``forward(x)``, both compiled, with the gradient ``slope(x, g)`` for a gradient g of what it returns."""
    compiled, backward = mx.compile(forward), mx.compile(slope)

    @mx.custom_function
    def function(x: mx.array) -> Any:
        return compiled(x)

    @function.vjp
    def gradient(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return backward(primals, cotangent)

    return cast(Callable[[mx.array], mx.array], function)


_rational_gelu = _with_slope(lambda x: x * _normal_cdf(x), lambda x, g: g * (_normal_cdf(x) + x * _normal_pdf(x)))


def gelu(x: mx.array) -> mx.array:
    """``x Phi(x)``, any shape; float32 error at most 1e-6 on the CPU, MLX's own function on Metal and in half
    precision.
    """
    return _rational_gelu(x) if _is_fast(x) else nn.gelu(x)


_logistic = mx.compile(lambda z: mx.where(z >= 0, 1.0, _exp_minus(mx.abs(z))) / (1 + _exp_minus(mx.abs(z))))


def _tanh_argument(x: mx.array) -> mx.array:
    """Twice the argument of the hyperbolic tangent: ``(1 + tanh u) / 2 = 1 / (1 + exp(-2u))``."""
    return 1.5957691216057308 * x * (1 + 0.044715 * x * x)


def _tanh_slope(x: mx.array, g: mx.array) -> mx.array:
    p = _logistic(_tanh_argument(x))
    return g * p * (1 + x * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * x * x))


_tanh_gelu = _with_slope(lambda x: x * _logistic(_tanh_argument(x)), _tanh_slope)


def gelu_tanh(x: mx.array) -> mx.array:
    """``x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2``, GPT-2's GELU, any shape; float32 error at most 1e-6 on the
    CPU, MLX's own function on Metal and in half precision.
    """
    return _tanh_gelu(x) if _is_fast(x) else nn.gelu_approx(x)


def _silu_slope(x: mx.array, g: mx.array) -> mx.array:
    p = _logistic(x)
    return g * p * (1 + x * (1 - p))


def _weighed_silu(x: mx.array) -> mx.array:
    """x or x exp(x), each over 1 + exp(-|x|): without a choice by sign, which the compiler would not vectorise."""
    e = _exp_minus(mx.abs(x))
    return (mx.maximum(x, 0) + mx.minimum(x, 0) * e) / (1 + e)


_rational_silu = _with_slope(_weighed_silu, _silu_slope)


def silu(x: mx.array) -> mx.array:
    """``x / (1 + exp(-x))``, any shape; float32 error at most 1e-6 on the CPU, MLX's own function on Metal and in half
    precision.
    """
    return _rational_silu(x) if _is_fast(x) else nn.silu(x)


_squares = mx.compile(lambda x, mean: (x - mean) * (x - mean))
_normalised = mx.compile(lambda x, mean, scale, bias: (x - mean) * scale + bias)


def group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float) -> mx.array:
    """Group normalisation (arXiv 1803.08494), the groups in order as torch has them.

    Args:
        x: [B,...places,C].
        weight: [C].
        bias: [C].
        groups: How many there are of channels.
        eps: What is added to a variance.

    Returns:
        As ``x``, in its dtype. Float32 on the CPU is exact to about 1e-6 for unit outputs, where MLX's own, which is
        taken elsewhere, is off by 2e-5 for 64 x 64 x 320 values and by 1e-3 for 512 x 512 x 128.
    """
    count, channels = x.shape[0], x.shape[-1]
    if not _is_fast(x):
        grouped = x.reshape(count, -1, groups, channels // groups).transpose(0, 2, 1, 3)
        flat = mx.fast.layer_norm(grouped.reshape(count, groups, -1), None, None, eps)
        return flat.reshape(grouped.shape).transpose(0, 2, 1, 3).reshape(x.shape) * weight + bias

    def by_group(values: mx.array) -> mx.array:
        """Means over groups and places, for each channel: axis by axis, for one long sum loses digits."""
        for axis in reversed(range(1, x.ndim - 1)):
            values = values.sum(axis=axis, keepdims=True)
        of_channels = values.reshape(count, groups, -1).sum(axis=-1, keepdims=True) / (x[0].size // groups)
        return mx.repeat(of_channels, channels // groups, axis=-1).reshape(values.shape)

    mean = by_group(x)
    variance = by_group(_squares(x, mean))
    return cast(mx.array, _normalised(x, mean, mx.rsqrt(variance + eps) * weight, bias))


_exponentials = mx.compile(lambda x, top: _exp_minus(top - x))
_softmax_backward = mx.compile(lambda p, g, dot: p * (g - dot))


@mx.custom_function
def _softmax(x: mx.array) -> Any:
    e = _exponentials(x, x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cast(mx.array, _softmax_backward(output, cotangent, (output * cotangent).sum(axis=-1, keepdims=True)))


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis of x float32; on the CPU exact to about 1e-5 relative, and 1e-14 for what is further
    than 32 below.
    """
    return cast(mx.array, _softmax(x)) if mx.default_device() == mx.cpu else mx.softmax(x, axis=-1)


CLOSED = -1000.0  # an additive mask closes what it puts as low, for e^-1000 is 0; hosts write -10000, -65504 or -inf
LEAST = -3e38  # what a closed score becomes: finite, so that a row without an open one is no NaN


def opened(mask: mx.array) -> mx.array:
    """Which places a mask leaves open, boolean: those that are true, or above -1000 in a mask that is added to
    scores.
    """
    return mask if mask.dtype == mx.bool_ else mask > CLOSED


def probabilities(q: mx.array, k: mx.array, scale: float | None = None, mask: mx.array | None = None) -> mx.array:
    """Softmax(scale q k^T + mask) [B,heads,N,M] float32; on the CPU exact to about 1e-5 relative.

    Args:
        q: [B,heads,N,d].
        k: [B,heads,M,d].
        scale: None for 1/sqrt(d).
        mask: Boolean, true where a query sees a key, or added to the scores; its shape broadcasts to [B,heads,N,M].
            Where it is closed (see ``opened``) the probability is exactly 0; so it is in a row without an open place.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.astype(mx.float32) * factor) @ k.astype(mx.float32).swapaxes(-1, -2)
    if mask is None:
        return softmax(scores)
    seen = opened(mask)
    if mask.dtype != mx.bool_:
        scores = scores + mask.astype(mx.float32)
    return mx.where(seen, softmax(mx.where(seen, scores, LEAST)), 0)


MANY, SOME = 2**22, 2**19  # probabilities that are not all held at once, and how many are then
# exp(-32 u) is the 32nd power of this polynomial of u on [0, 1], highest power first, to 9e-7 of its value (least
# squares with Lawson's weights for the least largest relative error).
_ROOT = (
    0.00084171954959703,
    -0.00763369510128198,
    0.0412022949860445,
    -0.166506213671654,
    0.499973892268791,
    -0.999998547077095,
    1.0,
)


@mx.compile
def _root_exponentials(scores: mx.array, top: mx.array) -> mx.array:
    """exp(-32 (top - scores)) for top >= scores, cut at e^-32: as ``_exponentials``, with fewer operations."""
    root = _horner(_ROOT, mx.minimum(top - scores, 1.0))
    for _ in range(5):
        root = root * root
    return root


def _in_pieces(q: mx.array, k: mx.array, v: mx.array, scale: float | None) -> mx.array:
    """``probabilities(q, k, scale) v``, some queries of one head at a time: pages of memory that are new to the process
    cost more than the arithmetic, and those of a piece are used again.

    Scores [M,rows] have a column for a query, so that the largest of each is found, and taken off, along rows of
    memory; values get a 1 more, so that the product with them sums the exponentials, too.
    """
    rows = max(1, SOME // k.shape[2])
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) / 32
    v = mx.concatenate([v, mx.ones_like(v[..., :1])], axis=-1).swapaxes(-1, -2)
    read, heads = (q.astype(mx.float32) * factor, k.astype(mx.float32), v), []
    # contiguous, for MLX copies what is not, for each product anew
    for queries, keys, values in zip(*(mx.contiguous(x.flatten(0, 1)) for x in read), strict=True):
        pieces = []
        for start in range(0, len(queries), rows):
            scores = keys @ queries[start : start + rows].T
            top = mx.stop_gradient(scores.max(axis=0, keepdims=True))
            sums = values @ _root_exponentials(scores, top)
            pieces.append(sums[:-1] / sums[-1:])
        heads.append(mx.concatenate(pieces, axis=-1))
    return mx.stack(heads).swapaxes(-1, -2).reshape(*q.shape[:-1], -1)


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float | None = None, mask: mx.array | None = None
) -> mx.array:
    """``probabilities(q, k, scale, mask) v``; v [B,heads,M,d]. Float32 on the CPU is exact to about 1e-5 relative,
    elsewhere MLX's own.
    """
    if _is_fast(q):
        if mask is None and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > MANY:
            return _in_pieces(q, k, v, scale)
        return probabilities(q, k, scale, mask) @ v
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=factor)
    seen = opened(mask)
    alive = seen.any(axis=-1, keepdims=True)  # a row without an open place is 0, and NaN in MLX's own
    added = mx.array(0.0) if mask.dtype == mx.bool_ else mask
    shown = mx.where(seen, added, mx.where(alive, -mx.inf, 0.0)).astype(q.dtype)
    return mx.where(alive, mx.fast.scaled_dot_product_attention(q, k, v, scale=factor, mask=shown), 0)
