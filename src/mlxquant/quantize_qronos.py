"""``python -m mlxquant.quantize_qronos``: Qronos with a damping chosen for each layer, the recipe ``qronos+damped``.

Block by block and, in a block, layer by layer, each on the inputs that the rounded layers before it write. The damping
is chosen on tokens that the layer's rounding has not seen, and recorded.
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
