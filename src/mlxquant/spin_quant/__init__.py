"""Learned rotations of language models (SpinQuant, arXiv 2405.16406): ``from mlxquant.spin_quant import SpinQuant``.

They are imported when they are first used: whoever only reads a file of SpinQuant's needs no learning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learning import Report, SpinQuant

__all__ = ["Report", "SpinQuant"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.learning"), name)
