"""Which methods exist. A new method is one file, one line in ``FILES``, one ``@register`` line and one
citation, and the law tests cover it.

Kinds: "steps" chooses the grid of a weight, "round" its codes, "range" the activation table of a layer, "tier" how many
bits its input gets at each timestep, "reconstruct" learns the codes of a whole block. "transform" is reserved for methods that change
what is quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from ..errors import RecipeError

KINDS = ("steps", "round", "range", "tier", "transform", "reconstruct")
FILES = ("steps", "rtn", "gptq", "descent", "adaround", "ranges", "tiers")
CITATIONS = {
    "gptq": """@inproceedings{frantar2023gptq,
  title = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2210.17323}
}""",
    "quantease": """@article{behdin2023quantease,
  title = {{QuantEase}: Optimization-based Quantization for Language Models},
  author = {Behdin, Kayhan and Acharya, Ayan and Gupta, Aman and Song, Qingquan
            and Zhu, Siyu and Keerthi, Sathiya and Mazumder, Rahul},
  journal = {arXiv preprint arXiv:2309.01885},
  year = {2023}
}""",
    "adaround": """@inproceedings{nagel2020adaround,
  title = {Up or Down? {A}daptive Rounding for Post-Training Quantization},
  author = {Nagel, Markus and Amjad, Rana Ali and van Baalen, Mart and Louizos, Christos and Blankevoort, Tijmen},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  note = {arXiv:2004.10568}
}""",
    "taqdit": """@article{liu2024taqdit,
  title = {{TaQ-DiT}: Time-aware Quantization for Diffusion Transformers},
  author = {Liu, Xinyan and Shi, Huihong and Xu, Yang and Wang, Zhongfeng},
  journal = {arXiv preprint arXiv:2411.14172},
  year = {2024}
}""",
}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered function; ``citation_key`` looks up its BibTeX in ``CITATIONS`` and is None for what nobody invented."""

    name: str
    kind: str
    function: Callable[..., Any]
    citation_key: str | None
    summary: str


_METHODS: dict[tuple[str, str], Method] = {}


def register(kind: str, name: str, *, citation: str | None = None, summary: str) -> Callable[[Function], Function]:
    """Enter the decorated function under its kind and name; a mistake here is the programmer's and raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"method {name!r}: unknown kind {kind!r}, expected one of {KINDS}")
    if citation is not None and citation not in CITATIONS:
        raise ValueError(f"method {name!r}: no citation {citation!r} in CITATIONS")

    def enter(function: Function) -> Function:
        if (kind, name) in _METHODS:
            raise ValueError(f"two {kind} methods are called {name!r}")
        _METHODS[kind, name] = Method(name, kind, function, citation, summary)
        return function

    return enter


@cache
def _load() -> None:
    for file in FILES:
        import_module(f"{__package__}.{file}")


def members(kind: str) -> tuple[Method, ...]:
    """All methods of a kind, by name."""
    _load()
    return tuple(method for (found, _), method in sorted(_METHODS.items()) if found == kind)


def get(kind: str, name: str) -> Method:
    """The method of this kind and name; raises RecipeError that lists the known ones."""
    known = {method.name: method for method in members(kind)}
    if name not in known:
        raise RecipeError(f"unknown {kind} method {name!r}; known: {', '.join(known) or 'none'}")
    return known[name]
