"""Integer matrix products in float32, exact: MLX has none of its own."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

EXACT = 2**24  # integers up to this magnitude are exact in float32


def use_packed_kernels() -> bool:
    """Whether to multiply by packed weights directly. On the CPU backend dequantizing first is 30 to 40 times
    faster.
    """
    return bool(mx.default_device() != mx.cpu)


def _matmul(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


def integer_matmul(
    x: mx.array,
    weight: mx.array,
    x_limit: int,
    weight_limit: int,
    multiply: Callable[[mx.array, mx.array], mx.array] = _matmul,
) -> mx.array:
    """``x W^T`` of integer-valued float32 arrays with |x| <= x_limit and |W| <= weight_limit, equal to int32
    arithmetic.

    x [..., in], weight [out, in]. The input is cut where a partial sum could pass 2^24; the parts are added as int32.
    ``multiply`` does it in float32 for the same columns of both, where rows of x meet only some of the weight's.
    Returns the float32 nearest to the exact sum.
    """
    width = weight.shape[1]
    chunk = max(1, EXACT // (x_limit * weight_limit))
    if width <= chunk:
        return multiply(x, weight)
    parts = [multiply(x[..., i : i + chunk], weight[:, i : i + chunk]).astype(mx.int32) for i in range(0, width, chunk)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.astype(mx.float32)
