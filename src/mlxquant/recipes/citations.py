"""Whom to cite: BibTeX of the papers behind a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from ..errors import RecipeError
from ..grids.weights import WeightFormat
from ..methods import registry
from ..methods.inputs.clipping import TAQDIT
from ..methods.registry import Citation
from ..methods.transforms.tcaq import TCAQ
from ..methods.weights.adaround import QDROP
from ..methods.weights.qronos import QRONOS
from .grammar import parse_recipe
from .recipe import ActivationSpec, LayerSpec, Recipe

BRECQ = Citation(
    "brecq",
    """@inproceedings{li2021brecq,
  title = {{BRECQ}: Pushing the Limit of Post-Training Quantization by Block Reconstruction},
  author = {Li, Yuhang and Gong, Ruihao and Tan, Xu and Yang, Yang and Hu, Peng and Zhang, Qi
            and Yu, Fengwei and Wang, Wei and Gu, Shi},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  note = {arXiv:2102.05426}
}""",
)
HAWQV2 = Citation(
    "hawqv2",
    """@article{dong2019hawqv2,
  title = {{HAWQ-V2}: Hessian Aware trace-Weighted Quantization of Neural Networks},
  author = {Dong, Zhen and Yao, Zhewei and Cai, Yaohui and Arfeen, Daiyaan and Gholami, Amir
            and Mahoney, Michael W. and Keutzer, Kurt},
  journal = {arXiv preprint arXiv:1911.03852},
  year = {2019}
}""",
)

Facts = Mapping[str, Any]


class Quantized(Protocol):
    """A model with the facts of how it was quantized; ``api.QuantizedModel`` is one."""

    facts: dict[str, Any]


# What a recipe may do beside its registered methods: what it is called, whose idea it is, and how a recipe's dictionary
# shows it.
FEATURES: tuple[tuple[str, Citation, Callable[[Facts], bool]], ...] = (
    (
        "post-GELU shift",
        TAQDIT,
        lambda recipe: any(spec["activation"] and spec["activation"]["shift"] for spec in specs(recipe)),
    ),
    ("corrected target", QRONOS, lambda recipe: any(spec["corrected"] for spec in specs(recipe))),
    ("quantized attention probabilities", TCAQ, lambda recipe: recipe["probabilities"] is not None),
    ("progressive alignment", TCAQ, lambda recipe: recipe["rounds"] > 1),
    ("errors weighed by sensitivity", BRECQ, lambda recipe: recipe["sensitivity"]),
    (
        "dropped quantization",
        QDROP,
        lambda recipe: recipe["learning"]["drop"] > 0 and any(spec["reconstruct"] for spec in specs(recipe)),
    ),
    (
        "mixed precision",
        HAWQV2,
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
    entries = [f"% {recipe['name']}: {', '.join(uses)}\n{paper.bibtex}\n" for paper, uses in papers([recipe]).items()]
    return "\n".join(entries)


def cited(recipes: Iterable[Facts]) -> list[dict[str, str]]:
    """The papers behind recipes (as plain data), for a report.

    Args:
        recipes: As ``Recipe.to_dict`` gives them, or as an older version did.

    Returns:
        A row a paper, in the order of their keys: ``name``, what it is used for, ``source``, its arXiv id, and
        ``bibtex``.
    """
    return [
        {"name": ", ".join(uses), "source": f"arXiv {paper.arxiv}" if paper.arxiv else "", "bibtex": paper.bibtex}
        for paper, uses in papers(Recipe("", ()).to_dict() | dict(recipe) for recipe in recipes).items()
    ]


def papers(recipes: Iterable[Facts]) -> dict[Citation, list[str]]:
    """The papers behind recipes in the order of their keys, each with all that it is used for, in words."""
    uses: dict[Citation, set[str]] = {}
    for recipe in recipes:
        for use, paper in used(recipe):
            uses.setdefault(paper, set()).add(use)
    return {paper: sorted(uses[paper]) for paper in sorted(uses, key=lambda paper: paper.key)}


def used(recipe: Facts) -> Iterator[tuple[str, Citation]]:
    """What of a recipe (as ``Recipe.to_dict`` gives it) has a paper, in words, and that; perhaps more than once."""
    for kind, name in methods(recipe):
        if (paper := registry.get(kind, name).citation) is not None:
            yield f"{kind} {name}", paper
    yield from ((feature, paper) for feature, paper, shows in FEATURES if shows(recipe))


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
