"""The convolutions of Inception, AlexNet and VGG, within bounded memory.

On the CPU MLX unfolds the input of a convolution, 9 times its size for 3×3 kernels: VGG on pictures of 1024 pixels
would take 5 GB. There the result is computed in strips of rows instead, which changes no value.
"""

from __future__ import annotations

import mlx.core as mx

UNFOLDED_BYTES = 2**27  # of a strip


def rectified(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> mx.array:
    """``max(conv(x) + bias, 0)`` of x [B,H,W,I] float32 with weight [O,h,w,I] and bias [O]; padding in rows and
    columns, with zeros.
    """
    kernel, columns = weight.shape[1:3]
    height = (x.shape[1] + 2 * padding[0] - kernel) // stride + 1
    width = (x.shape[2] + 2 * padding[1] - columns) // stride + 1
    rows = UNFOLDED_BYTES // (x.shape[0] * width * weight[0].size * 4) if mx.default_device() == mx.cpu else height
    if rows >= height:
        return mx.maximum(mx.conv2d(x, weight, stride=stride, padding=padding) + bias, 0)
    strips = []
    for start in range(0, height, max(1, rows)):
        first = start * stride - padding[0]
        last = (min(start + max(1, rows), height) - 1) * stride - padding[0] + kernel
        strip = mx.pad(
            x[:, max(first, 0) : last], [(0, 0), (max(-first, 0), max(last - x.shape[1], 0)), (0, 0), (0, 0)]
        )
        strips.append(mx.maximum(mx.conv2d(strip, weight, stride=stride, padding=(0, padding[1])) + bias, 0))
        mx.eval(strips[-1])
    return mx.concatenate(strips, axis=1)
