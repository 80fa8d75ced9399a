"""Group normalisation as torch has it, exact on the CPU, too."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ...layers.fast_cpu import group_norm


class GroupNorm(nn.GroupNorm):
    """MLX's GroupNorm in torch's order of groups, see ``fast_cpu.group_norm``."""

    def __init__(self, num_groups: int, dims: int, eps: float):
        super().__init__(num_groups, dims, eps=eps, pytorch_compatible=True)

    def __call__(self, x: mx.array) -> mx.array:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)
