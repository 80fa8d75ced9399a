"""Recipes: which format and which methods for which layer.

A recipe is an ordered list of rules; the first rule whose pattern matches a layer's path decides. A pattern is a glob over the
dotted path, or ``@role`` for a role that the model's adapter names. Presets are parsed from their names, such as ``gptq-w4a8``,
``rtn-w3a16-g128`` or ``gptq-w8a8-static``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from .activations import BITS
from .errors import RecipeError
from .formats import WeightFormat
from .methods.adaround import Settings
from .methods.tiers import BUDGET

ROLES = ("attention", "mlp", "modulation", "embedder", "output")


@dataclass(frozen=True)
class ActivationSpec:
    """Static activation quantization: ``bits`` 4, 6 or 8; ``range`` a range method; one entry a timestep, or one for all.

    With a ``budget`` each layer takes at each timestep the fewest bits, at most ``bits``, whose error on calibration data stays within
    it, and post-GELU inputs are shifted where that lowers the error. The budget is mean squared
    velocity error in a recipe with ``sensitivity``, and relative squared error of the layer's output in one without.
    """

    bits: int = 8
    range: str = "extremes"
    per_timestep: bool = True
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS[:-1]:
            raise RecipeError(f"activation bits must be one of {BITS[:-1]}, found {self.bits}; leave the activation out for 16")
        if self.budget is not None and not 0 < self.budget < inf:
            raise RecipeError(f"the error budget of activations must be a positive number, found {self.budget}; None fixes the bits")


@dataclass(frozen=True)
class LayerSpec:
    """What happens to a layer: weight format, how its steps are chosen, how it is rounded, and its activations (None: not quantized).

    ``corrected`` aims the rounding at weights that make up for the error of the layers before. ``reconstruct`` names the method that
    then learns the codes of a stage together, starting from these.
    """

    weight: WeightFormat
    activation: ActivationSpec | None = None
    steps: str = "extremes"
    rounding: str = "rtn"
    corrected: bool = False
    reconstruct: str | None = None

    @property
    def plain(self) -> LayerSpec:
        """The same format by round-to-nearest: what every method has to beat."""
        return replace(self, steps="extremes", rounding="rtn", corrected=False, reconstruct=None)

    @property
    def start(self) -> LayerSpec:
        """What a reconstruction starts from."""
        return replace(self, reconstruct=None)


@dataclass(frozen=True)
class Recipe:
    """``rules``: pattern and specification (None keeps the layer as it is), in order. ``gate``: keep round-to-nearest where it wins.

    ``learning`` is for the layers that are reconstructed. With ``sensitivity`` errors inside the model count as far as they change
    what it predicts; without, all channels and noise levels count the same.
    """

    name: str
    rules: tuple[tuple[str, LayerSpec | None], ...]
    gate: bool = True
    learning: Settings = field(default_factory=Settings)
    sensitivity: bool = False

    def plan(self, layers: Mapping[str, str]) -> dict[str, LayerSpec]:
        """Layers (path to role) to what happens to each; raises RecipeError when a glob matches no layer at all."""
        for pattern, _ in self.rules:
            if pattern.startswith("@") and pattern[1:] not in ROLES:
                raise RecipeError(f"recipe {self.name}: unknown role {pattern!r}; roles are {', '.join('@' + role for role in ROLES)}")
            if not pattern.startswith("@") and not any(_matches(pattern, path, role) for path, role in layers.items()):
                raise RecipeError(
                    f"recipe {self.name}: pattern {pattern!r} matches none of the model's {len(layers)} layers, "
                    f"such as {next(iter(layers), 'none')!r}"
                )
        plan = {}
        for path, role in layers.items():
            spec = next((spec for pattern, spec in self.rules if _matches(pattern, path, role)), None)
            if spec is not None:
                plan[path] = spec
        if not plan:
            raise RecipeError(f"recipe {self.name} quantizes no layer of this model")
        return plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "gate": self.gate,
            "learning": asdict(self.learning),
            "sensitivity": self.sensitivity,
            "rules": [[pattern, None if spec is None else asdict(spec)] for pattern, spec in self.rules],
        }


def _matches(pattern: str, path: str, role: str) -> bool:
    return role == pattern[1:] if pattern.startswith("@") else fnmatchcase(path, pattern)


@dataclass(frozen=True)
class Method:
    """What a recipe's METHOD stands for: how weights are rounded (see LayerSpec), the ``budget`` of quantized activations, and whether
    the recipe weighs errors by ``sensitivity``."""

    steps: str
    rounding: str
    reconstruct: str | None = None
    budget: float | None = None
    sensitivity: bool = False


METHODS = {
    "rtn": Method("extremes", "rtn"),
    "gptq": Method("search", "gptq"),
    "descent": Method("search", "gptq-descent"),
    "adaround": Method("search", "rtn", reconstruct="adaround"),
    "taqdit": Method("search", "gptq", reconstruct="adaround", budget=BUDGET, sensitivity=True),
}
_SPEC = re.compile(r"(w[2-8])a(4|6|8|16)((?:-tensor|-g\d+)?(?:-sym|-asym)?)(-static)?")


def parse_spec(text: str, method: Method) -> LayerSpec:
    """``w4a8``, ``w4a16-g128``, ``w8a8-static`` … by a method; raises RecipeError with the grammar."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"{text!r} is no specification; expected wBaB with weights of 2 to 8 bits and activations of 4, 6, 8 or 16, "
            "then optionally -g32/-g64/-g128/-tensor, -sym/-asym and -static"
        )
    activation = None if match[2] == "16" else ActivationSpec(int(match[2]), per_timestep=match[4] is None, budget=method.budget)
    weight = WeightFormat.parse(match[1] + match[3])
    return LayerSpec(weight, activation, method.steps, method.rounding, reconstruct=method.reconstruct)


def parse_override(text: str, method: Method) -> tuple[str, LayerSpec | None]:
    """A rule ``PATTERN=SPEC``; SPEC is a preset's name without its method, such as w8a16, or ``keep``. Raises RecipeError."""
    pattern, equals, spec = text.partition("=")
    if not equals or not pattern:
        raise RecipeError(f"override {text!r}: expected PATTERN=SPEC, such as '*.mlp.fc2=w8a16' or '@attention=keep'")
    return pattern, None if spec == "keep" else parse_spec(spec, method)


def parse_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A preset by name, ``METHOD-SPEC``, behind the rules of ``overrides`` (see ``parse_override``), which keep its method.

    Modulation, embedders and the output layer keep at least 8 bits and unquantized inputs: their error enters every block at every
    step.
    """
    named, dash, text = name.partition("-")
    if not dash or named not in METHODS:
        raise RecipeError(
            f"unknown recipe {name!r}; expected METHOD-SPEC with METHOD one of {sorted(METHODS)}, such as rtn-w4a8 or gptq-w4a8"
        )
    method = METHODS[named]
    try:
        main = parse_spec(text, method)
    except RecipeError as error:
        raise RecipeError(f"unknown recipe {name!r}: {error}") from error
    careful = replace(main.start, weight=replace(main.weight, bits=8), activation=None)
    rules = [parse_override(text, method) for text in overrides]
    rules += [(role, careful) for role in ("@modulation", "@embedder", "@output")]
    return Recipe(",".join([name, *overrides]), (*rules, ("*", main)), sensitivity=method.sensitivity)
