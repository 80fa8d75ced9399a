"""``python -m mlxquant.quantize_qronos``: seed 002's Qronos, as the recipe ``qronos+damped``.

Block by block and, in a block, layer by layer, each on the inputs that the rounded layers before it write. The damping,
which the original raised for feed-forward layers, is chosen for each layer, on tokens that its rounding has not seen,
and recorded.
"""

from __future__ import annotations

from ._recipe_command import recipe_command

command = recipe_command(
    "quantize-qronos",
    "qronos+damped",
    4,
    8,
    "Quantize a model by Qronos, which corrects the error of the layers before as it rounds.",
)

if __name__ == "__main__":
    command()
