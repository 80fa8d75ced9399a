"""One small layer of each class of MLX that has a quantized form."""

import mlx.nn as nn

from mlxquant.layers.switch import SwitchLinear

MADE = {
    nn.Linear: lambda: nn.Linear(64, 8),
    nn.Embedding: lambda: nn.Embedding(8, 64),
    nn.Conv1d: lambda: nn.Conv1d(3, 8, 3),
    nn.Conv2d: lambda: nn.Conv2d(3, 8, 3, stride=2),
    nn.Conv3d: lambda: nn.Conv3d(3, 8, 3),
    nn.ConvTranspose1d: lambda: nn.ConvTranspose1d(3, 8, 3),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(3, 8, 3, padding=1),
    SwitchLinear: lambda: SwitchLinear(64, 8, 3),
    nn.ConvTranspose3d: lambda: nn.ConvTranspose3d(3, 8, 3),
}
