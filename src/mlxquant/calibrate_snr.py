"""``python -m mlxquant.calibrate_snr``: activation scales that follow the log-SNR, as the recipe ``rtn+logsnr``.

How is in ``methods.inputs.time_networks``: 6 octaves of the model's own schedule, its own prompts and trajectories, the
ranges of inputs, and targets at the bits that are asked for.
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
