"""``python -m mlxquant.calibrate_snr``: seed 002's Log-SNR calibration, as the recipe ``rtn+logsnr``.

What the original got wrong is right in ``methods.time_networks``: 6 octaves for 64, the model's own schedule, its own
prompts and trajectories for Gaussian noise, inputs for outputs, targets at the bits that are asked for.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "calibrate-snr",
    "rtn+logsnr",
    8,
    8,
    "Quantize a model with activation scales that follow the log-SNR, and weights rounded to nearest.",
)

if __name__ == "__main__":
    command()
