"""Whom to cite: BibTeX of the papers behind a recipe.

The paper of a registered method stands in the method's file. What else a recipe can do has its paper in the file of the
idea, or, where no method's file has it, here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from ..errors import RecipeError
from ..methods import registry
from ..methods.inputs.clipping import TAQDIT
from ..methods.registry import Citation
from ..methods.transforms.tcaq import TCAQ
from ..methods.weights.adaround import QDROP
from ..methods.weights.qronos import QRONOS
from .grammar import parse_recipe
from .recipe import LayerSpec, Recipe

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


EFFICIENTQAT = Citation(
    "efficientqat",
    """@article{chen2024efficientqat,
  title = {{EfficientQAT}: Efficient Quantization-Aware Training for Large Language Models},
  author = {Chen, Mengzhao and Shao, Wenqi and Xu, Peng and Wang, Jiahao and Gao, Peng
            and Zhang, Kaipeng and Luo, Ping},
  journal = {arXiv preprint arXiv:2407.11062},
  year = {2024}
}""",
)


class WithFacts(Protocol):
    """A model with the facts of how it was quantized; ``api.model.QuantizedModel`` is one."""

    facts: dict[str, Any]


# What a recipe may do beside its registered methods: what it is called, whose idea it is, and how a recipe shows it.
FEATURES: tuple[tuple[str, Citation, Callable[[Recipe], bool]], ...] = (
    (
        "post-GELU shift",
        TAQDIT,
        lambda recipe: any(spec.activation is not None and spec.activation.shift for spec in specs(recipe)),
    ),
    ("corrected target", QRONOS, lambda recipe: any(spec.corrected for spec in specs(recipe))),
    ("quantized attention probabilities", TCAQ, lambda recipe: recipe.probabilities is not None),
    ("progressive alignment", TCAQ, lambda recipe: recipe.rounds > 1),
    ("errors weighed by sensitivity", BRECQ, lambda recipe: recipe.sensitivity),
    (
        "dropped quantization",
        QDROP,
        lambda recipe: recipe.learning.drop > 0 and any(spec.reconstruct for spec in specs(recipe)),
    ),
    ("mixed precision", HAWQV2, lambda recipe: recipe.allocates),
    ("tuned scales", EFFICIENTQAT, lambda recipe: recipe.tuning is not None),
)


def citation(of: str | Recipe | WithFacts) -> str:
    """BibTeX of every paper that a recipe uses, each once, under a comment that says for what.

    Args:
        of: A recipe, its name, or a quantized model, which may be of an older version.

    Returns:
        The entries in the order of their keys, empty where there is none: what nobody claims, such as rounding to
        nearest, has no entry.

    Raises:
        RecipeError: The name is unknown, or ``of`` is something else.
    """
    if isinstance(of, str):
        recipe = parse_recipe(of)
    elif isinstance(of, Recipe):
        recipe = of
    elif hasattr(of, "facts"):
        recipe = Recipe.from_dict(of.facts["recipe"])
    else:
        raise RecipeError(f"{of!r}: expected a recipe, its name, or a quantized model")
    return "\n".join(
        f"% {recipe.name}: {', '.join(uses)}\n{paper.bibtex}\n" for paper, uses in papers([recipe]).items()
    )


def cited(recipes: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The papers behind some recipes, for a report.

    Args:
        recipes: As ``Recipe.to_dict`` gives them, perhaps of an older version.

    Returns:
        A row a paper, in the order of their keys: ``name``, what it is used for, ``source``, its arXiv id, and
        ``bibtex``.
    """
    return [
        {"name": ", ".join(uses), "source": f"arXiv {paper.arxiv}" if paper.arxiv else "", "bibtex": paper.bibtex}
        for paper, uses in papers(map(Recipe.from_dict, recipes)).items()
    ]


def papers(recipes: Iterable[Recipe]) -> dict[Citation, list[str]]:
    """The papers behind recipes in the order of their keys, each with all that it is used for, in words."""
    uses: dict[Citation, set[str]] = {}
    for recipe in recipes:
        for kind, name in methods(recipe):
            if (paper := registry.get(kind, name).citation) is not None:
                uses.setdefault(paper, set()).add(f"{kind} {name}")
        for feature, paper, shows in FEATURES:
            if shows(recipe):
                uses.setdefault(paper, set()).add(feature)
    return {paper: sorted(uses[paper]) for paper in sorted(uses, key=lambda paper: paper.key)}


def methods(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Kind and name of the registered methods that a recipe uses; perhaps more than once."""
    for spec in specs(recipe):
        yield from (("steps", spec.steps), ("round", spec.rounding))
        yield from (("transform", name) for name in spec.transforms)
        named = (("branch", spec.branch), ("reconstruct", spec.reconstruct), ("refine", spec.refine))
        yield from ((kind, name) for kind, name in named if name)
        if spec.activation is not None:
            yield "range", spec.activation.range
            if spec.activation.budget is not None:
                yield "tier", "error"


def specs(recipe: Recipe) -> Iterator[LayerSpec]:
    """What a recipe does to layers; not where it leaves them as they are."""
    return (spec for _, spec in recipe.rules if spec is not None)
