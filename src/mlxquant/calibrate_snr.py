"""``mlxquant calibrate-snr``: scales that follow the log-SNR, as the recipe ``rtn+logsnr``.

``methods.inputs.time_networks`` says how: 6 octaves, the model's own schedule, its own prompts and trajectories, the
layers' inputs, and targets at the bits that are asked for.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "calibrate-snr",
    "rtn+logsnr",
    8,
    8,
    "Quantize with activation scales by log-SNR.",
    "A small network maps the log-SNR of a step to each layer's scales; weights are rounded to nearest.",
)

if __name__ == "__main__":
    command()
