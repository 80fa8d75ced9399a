"""``mlxquant quantize-qronos-4blocks``: Qronos on the first four blocks of a model, all else in full precision.

One sees soon what the recipe does to a model, before all of it is quantized: the blocks run one by one, and each keeps
no more than what enters it.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "quantize-qronos-4blocks",
    "qronos+damped",
    4,
    8,
    "Quantize four blocks by Qronos.",
    "All else stays in full precision, so that one sees soon what the recipe does to the first blocks.",
    blocks=4,
)

if __name__ == "__main__":
    command()
