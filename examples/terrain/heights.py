"""From noise to metres, as the package's own ``TerrainGenerator`` does it: one step from noise alone."""

import mlx.core as mx
import numpy as np

from terrain.network import SIGMA_MAX

SIDE = 128  # places of a height map, a way
DIFFICULTIES = 100  # from 1, which is flat
TALLEST = 22.16864013671875  # metres
BEND = 0.1  # metres, below which heights and what the network draws of them are nearly proportional


def drawn(model, seed, difficulty):
    """What the model draws for a seed and a difficulty from 1 to 100: float32 [128,128] in [-1,1]."""
    noise = np.random.default_rng(seed).standard_normal((1, SIDE, SIDE, 1), dtype=np.float32)
    sigma = mx.array([SIGMA_MAX], mx.float32)
    label = mx.array([(difficulty - 1) / (DIFFICULTIES - 1)], mx.float32)
    return np.array(model(sigma * mx.array(noise), sigma, label))[0, :, :, 0]


def metres(drawn):
    """Heights above the lowest place: float32 [...,128,128] of what was drawn."""
    unit = (drawn + 1) / 2
    heights = BEND * np.sinh(unit * np.arcsinh(TALLEST / BEND))
    return (heights - heights.min((-2, -1), keepdims=True)).astype(np.float32)
