"""Whom to cite: BibTeX of the papers behind a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from ..errors import RecipeError
from ..grids.weights import WeightFormat
from ..methods import registry
from .presets import parse_recipe
from .recipe import ActivationSpec, LayerSpec, Recipe

Facts = Mapping[str, Any]


class Quantized(Protocol):
    """A model with the facts of how it was quantized; ``api.QuantizedModel`` is one."""

    facts: dict[str, Any]


# What a recipe may do beside its registered methods: what it is called, whose idea it is, and how a recipe's dictionary
# shows it.
FEATURES: tuple[tuple[str, str, Callable[[Facts], bool]], ...] = (
    (
        "post-GELU shift",
        "taqdit",
        lambda recipe: any(spec["activation"] and spec["activation"]["shift"] for spec in specs(recipe)),
    ),
    ("corrected target", "qronos", lambda recipe: any(spec["corrected"] for spec in specs(recipe))),
    ("quantized attention probabilities", "tcaq", lambda recipe: recipe["probabilities"] is not None),
    ("progressive alignment", "tcaq", lambda recipe: recipe["rounds"] > 1),
    ("errors weighed by sensitivity", "brecq", lambda recipe: recipe["sensitivity"]),
    (
        "dropped quantization",
        "qdrop",
        lambda recipe: recipe["learning"]["drop"] > 0 and any(spec["reconstruct"] for spec in specs(recipe)),
    ),
    (
        "mixed precision",
        "hawqv2",
        lambda recipe: any(recipe[key] for key in ("mixed", "bits_per_weight", "bits_per_activation")),
    ),
)


def citation(of: str | Recipe | Quantized) -> str:
    """BibTeX of every paper that a recipe uses, each once and in the order of their keys, under a comment that says for
    what.

    ``of`` is a recipe, its name, or a quantized model. What nobody claims, such as rounding to nearest, has no entry.
    Raises RecipeError on an unknown name, or on something else.
    """
    if isinstance(of, str):
        of = parse_recipe(of)
    if not isinstance(of, Recipe) and not hasattr(of, "facts"):
        raise RecipeError(f"{of!r}: expected a recipe, its name, or a quantized model")
    recipe = (
        of.to_dict() if isinstance(of, Recipe) else Recipe("", ()).to_dict() | of.facts["recipe"]
    )  # an older version knew fewer keys
    uses: dict[str, list[str]] = {}
    for use, key in sorted(set(used(recipe))):
        uses.setdefault(key, []).append(use)
    entries = [f"% {recipe['name']}: {', '.join(uses[key])}\n{registry.CITATIONS[key]}\n" for key in sorted(uses)]
    return "\n".join(entries)


def used(recipe: Facts) -> Iterator[tuple[str, str]]:
    """What of a recipe (as ``Recipe.to_dict`` gives it) has a paper, in words, and the paper's key; perhaps more than
    once.
    """
    for kind, name in methods(recipe):
        if (key := registry.get(kind, name).citation_key) is not None:
            yield f"{kind} {name}", key
    yield from ((feature, key) for feature, key, shows in FEATURES if shows(recipe))


def methods(recipe: Facts) -> Iterator[tuple[str, str]]:
    """Kind and name of the registered methods that a recipe uses; perhaps more than once."""
    for spec in specs(recipe):
        yield "steps", spec["steps"]
        yield "round", spec["rounding"]
        yield from (("transform", name) for name in spec["transforms"])
        yield from ((kind, spec[kind]) for kind in ("branch", "reconstruct") if spec[kind])
        if spec["refine"]:
            yield (
                "refine",
                "refit" if spec["refine"] is True else spec["refine"],
            )  # an older version had one, and said whether
        if activation := spec["activation"]:
            yield "range", activation["range"]
            if activation["budget"] is not None:
                yield "tier", "error"


def specs(recipe: Facts) -> Iterator[dict[str, Any]]:
    """What a recipe does to layers, as dictionaries with all their keys; not where it leaves them as they are."""
    for spec in (spec for _, spec in recipe["rules"] if spec is not None):
        activation = spec["activation"] and asdict(ActivationSpec()) | spec["activation"]
        yield asdict(LayerSpec(WeightFormat())) | spec | {"activation": activation}
