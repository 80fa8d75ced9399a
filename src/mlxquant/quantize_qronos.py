"""``mlxquant quantize-qronos``: Qronos, as the recipe ``qronos+damped``.

Block by block and, in a block, layer by layer, each on the inputs that the rounded layers before it write. The damping
is chosen for each layer, on tokens that its rounding has not seen, and recorded.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "quantize-qronos",
    "qronos+damped",
    4,
    8,
    "Quantize by Qronos.",
    "It corrects the error of the layers before as it rounds.",
)

if __name__ == "__main__":
    command()
