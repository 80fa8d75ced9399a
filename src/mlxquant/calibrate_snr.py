"""``mlxquant calibrate-snr``: scales that follow the log-SNR, as the recipe ``rtn+logsnr``.

``methods.inputs.time_networks`` says how: a network a layer over Fourier features of 6 octaves, trained on the error of
the layer's output at the bits that are asked for, on the model's own schedule, prompts and trajectories.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "calibrate-snr",
    "rtn+logsnr",
    8,
    8,
    "Quantize with activation scales by log-SNR.",
    "A network trained on each layer's output error maps the log-SNR to its scales; weights are rounded to nearest.",
)

if __name__ == "__main__":
    command()
