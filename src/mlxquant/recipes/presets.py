"""What the names in recipes stand for, as data: ``PRESETS`` come first in a name, ``INGREDIENTS`` after a ``+``.

A preset is a template: a layer and a recipe in which all is set but what the rest of the name says, formats and rules.
An ingredient is the fields that it sets. ``grammar`` reads names and fills templates in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..grids.weights import GROUPS, WeightFormat
from ..methods.inputs.tiers import BUDGET, TIERS
from .recipe import ActivationSpec, LayerSpec, Recipe
from .tuning import Tuning

RANK = 32  # of a branch that names none, as in SVDQuant
LIKE_INPUTS = "like inputs"  # probabilities of as many bits as a recipe's inputs, exact where these are


@dataclass(frozen=True)
class Template:
    """A layer and a recipe with everything but formats, name and rules, which are those of no layer and stand for what
    will be filled in.

    Args:
        layer: What happens to each layer; ``layer.activation`` counts where inputs are quantized at all.
        recipe: What happens to the model.
        probabilities: Bits of attention probabilities, or ``LIKE_INPUTS``; None leaves them as they are.
        embeddings: Whether tables of embeddings are quantized, too, in the recipe's own format.
    """

    layer: LayerSpec
    recipe: Recipe
    probabilities: int | str | None = None
    embeddings: bool = False

    @property
    def activation(self) -> ActivationSpec:
        """That of ``layer``, which always has one here."""
        assert self.layer.activation is not None
        return self.layer.activation

    def but(self, **changes: Any) -> Template:
        """The same with other values of some fields, each in the part that has a field of this name.

        Raises:
            TypeError: No part has such a field.
            RecipeError: The parts do not go together any more.
        """
        own, recipe, layer, activation = (
            {field.name: changes.pop(field.name) for field in fields(part) if field.name in changes}
            for part in (self, self.recipe, self.layer, self.activation)
        )
        if changes:
            raise TypeError(f"a recipe has no {', '.join(sorted(changes))}")
        quantized = replace(self.layer, activation=replace(self.activation, **activation), **layer)
        return replace(self, layer=quantized, recipe=replace(self.recipe, **recipe), **own)

    @property
    def settings(self) -> dict[str, Any]:
        """Every field of the parts by its name, which no two parts share but for ``probabilities``: that is the
        template's own.
        """
        parts = (self.layer, self.activation, self.recipe, self)
        found = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        return {name: value for name, value in found.items() if name not in ("layer", "activation", "recipe")}


USUAL = Template(LayerSpec(WeightFormat(), ActivationSpec(), steps="search", rounding="gptq"), Recipe("", ()))
PRESETS = {
    "rtn": USUAL.but(steps="extremes", rounding="rtn"),
    "gptq": USUAL,
    "descent": USUAL.but(rounding="gptq-descent"),
    "qronos": USUAL.but(rounding="qronos", sequential=True),
    "gptaq": USUAL.but(rounding="gptaq", sequential=True),
    "smoothquant": USUAL.but(steps="extremes", rounding="rtn", transforms=("smoothquant",)),
    "quarot": USUAL.but(transforms=("rotation",)),
    "svdquant": USUAL.but(transforms=("smoothquant",), branch="svd", rank=RANK),
    "adaround": USUAL.but(rounding="rtn", reconstruct="adaround"),
    "tcaqdm": USUAL.but(
        rounding="rtn",
        reconstruct="adaround",
        transforms=("tcaq",),
        range="dynamic",
        rounds=2,
        probabilities=LIKE_INPUTS,
    ),
    "mixed": USUAL.but(mixed=True),
    "taqdit": USUAL.but(
        reconstruct="adaround", transforms=("smoothquant",), shift=True, budget=BUDGET, sensitivity=True
    ),
}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "shift": {"shift": True},
    "corrected": {"corrected": True, "sequential": True},  # its target is for the inputs that a layer will really get
    "sequential": {"sequential": True},
    "sensitivity": {"sensitivity": True},
    "damped": {"held_out": True},
    "centred": {"centred": True},
    "learned": {"reconstruct": "adaround"},
    "unclipped": {"steps": "extremes"},
    "tiers": {"budget": BUDGET, "sensitivity": True},
    "progressive": {"rounds": 2},
    "mixed": {"mixed": True},
    "embeddings": {"embeddings": True},
    "tuned": {"tuning": Tuning()},
    **{f"tuned{group}": {"tuning": Tuning(group=group)} for group in GROUPS},
    **{f"softmax{bits}": {"probabilities": bits} for bits in TIERS},
}
