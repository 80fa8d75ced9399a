"""Convolutions of pictures within bounded memory.

On the CPU MLX unfolds the input of a convolution, 9 times its size for 3×3 kernels: pictures of 1024 pixels take 5 to
10 GB in VGG or in a decoder of latents. There the result is computed in strips of rows instead, which changes no value.
"""

from __future__ import annotations

import mlx.core as mx

UNFOLDED_BYTES = 2**24  # of a strip; the fastest of those that benchmarks/picture_layers.py tries


def convolved(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    rectify: bool = False,
) -> mx.array:
    """``conv(x) + bias``.

    Args:
        x: [B,H,W,I].
        weight: [O,h,w,I].
        bias: [O].
        stride: From one output to the next, in rows and in columns.
        padding: Zeros before and behind the rows, and the columns.
        rectify: Whether what is below 0 becomes 0.

    Returns:
        [B,H',W',O].
    """
    kernel, columns = weight.shape[1:3]
    height = (x.shape[1] + 2 * padding[0] - kernel) // stride + 1
    width = (x.shape[2] + 2 * padding[1] - columns) // stride + 1
    rows = UNFOLDED_BYTES // (x.shape[0] * width * weight[0].nbytes) if mx.default_device() == mx.cpu else height
    if rows >= height:
        return _finished(mx.conv2d(x, weight, stride=stride, padding=padding) + bias, rectify)
    strips = []
    for start in range(0, height, max(1, rows)):
        first = start * stride - padding[0]
        last = (min(start + max(1, rows), height) - 1) * stride - padding[0] + kernel
        strip = mx.pad(
            x[:, max(first, 0) : last], [(0, 0), (max(-first, 0), max(last - x.shape[1], 0)), (0, 0), (0, 0)]
        )
        strips.append(_finished(mx.conv2d(strip, weight, stride=stride, padding=(0, padding[1])) + bias, rectify))
        mx.eval(strips[-1])
    return mx.concatenate(strips, axis=1)


def _finished(y: mx.array, rectify: bool) -> mx.array:
    return mx.maximum(y, 0) if rectify else y
