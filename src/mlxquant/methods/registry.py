"""Which methods exist. A method is one file: its function, decorated with ``register``, and its paper. Nothing else has
to be edited, and the law tests cover it.

Whoever asks first for a method has every module of ``mlxquant.methods`` imported, and importing a file is what enters
its methods; a file of one's own enters its methods alike, whenever it is imported. So a list of methods depends on what
is there and never on the order in which files were found: ``members`` goes by name.

Kinds: "steps" chooses the grid of a weight, "round" its codes, "refine" improves both by turns, "range" chooses the
activation table of a layer, "tier" how many bits its input gets at each timestep, "transform" what could be done to its
input before, "branch" what low-rank factors take from its weight, "reconstruct" learns the codes of a whole block,
"fake" is what a model is trained through.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar

from ..errors import RecipeError

KINDS = ("steps", "round", "range", "tier", "refine", "transform", "branch", "reconstruct", "fake")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Citation:
    """A paper: ``key``, a short name by which lists of papers go, and its ``bibtex``. Raises ValueError when that is
    none.
    """

    key: str
    bibtex: str

    def __post_init__(self) -> None:
        if re.match(r"@\w+\{", self.bibtex) is None or self.bibtex.count("{") != self.bibtex.count("}"):
            raise ValueError(f"citation {self.key!r}: expected one BibTeX entry, such as @article{{...}}")

    @property
    def arxiv(self) -> str | None:
        """The id on arXiv, such as 2210.17323; None where the entry has none."""
        found = re.search(r"arXiv:(\d{4}\.\d{4,5})", self.bibtex)
        return None if found is None else found[1]


@dataclass(frozen=True)
class Method:
    """A registered function; its ``citation`` is None for what nobody claims. ``cross`` says that it needs the cross
    moments with the full-precision model's inputs, ``two_sided`` that it looks at how errors of outputs add up,
    ``over_time`` that it is about how inputs change with the noise level.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    citation: Citation | None
    summary: str
    cross: bool = False
    over_time: bool = False
    two_sided: bool = False

    @property
    def damped(self) -> bool:
        """Whether it takes a damping."""
        return "damping" in signature(self.function).parameters


_METHODS: dict[tuple[str, str], Method] = {}


def register(
    kind: str,
    name: str,
    *,
    citation: Citation | None = None,
    summary: str,
    cross: bool = False,
    over_time: bool = False,
    two_sided: bool = False,
) -> Callable[[Function], Function]:
    """Enter the decorated function under its kind and name; recipes can name it at once.

    Args:
        kind: One of ``KINDS``, which decides the function's signature (docs/new-method.md has them all).
        name: What recipes call it; unique within its kind.
        citation: The paper that it is from; none for what nobody claims, such as rounding to nearest.
        summary: What it does, in a line of ``mlxquant methods``.
        cross: Whether it needs ``Moments.cross``, the products with the full-precision model's inputs.
        two_sided: Whether it looks at ``Moments.outputs``, how errors of outputs add up.
        over_time: Whether it is about how inputs change with the noise level, which language models do not have.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        ValueError: The kind is unknown, the name is taken, or two papers have one key: the programmer's mistakes.
    """
    if kind not in KINDS:
        raise ValueError(f"method {name!r}: unknown kind {kind!r}, expected one of {KINDS}")

    def enter(function: Function) -> Function:
        if (kind, name) in _METHODS:
            raise ValueError(f"two {kind} methods are called {name!r}")
        for other in _METHODS.values():
            if citation and other.citation and citation.key == other.citation.key and citation != other.citation:
                raise ValueError(f"{kind} {name} and {other.kind} {other.name} cite two papers as {citation.key!r}")
        _METHODS[kind, name] = Method(name, kind, function, citation, summary, cross, over_time, two_sided)
        return function

    return enter


@cache
def _import_all() -> None:
    """Import every module beside this one, in the folders below, too; what fails to import is an error."""
    folder = import_module(__package__)
    # each is imported here before the walk looks into it: the walk alone would pass over a folder that fails to import
    for module in pkgutil.walk_packages(folder.__path__, f"{__package__}."):
        if not module.name.endswith(".__main__"):
            import_module(module.name)


def members(kind: str) -> tuple[Method, ...]:
    """All methods of a kind, by name.

    Args:
        kind: One of ``KINDS``.

    Returns:
        The package's own methods, and those that were registered elsewhere so far.
    """
    _import_all()
    return tuple(method for (found, _), method in sorted(_METHODS.items()) if found == kind)


def get(kind: str, name: str) -> Method:
    """The method of this kind and name.

    Args:
        kind: One of ``KINDS``.
        name: As it was registered.

    Returns:
        The method; its ``function`` has the signature of its kind.

    Raises:
        RecipeError: There is none; the message lists what there is.
    """
    known = {method.name: method for method in members(kind)}
    if name not in known:
        raise RecipeError(f"unknown {kind} method {name!r}; known: {', '.join(known) or 'none'}")
    return known[name]
