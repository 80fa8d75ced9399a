"""Model names to adapters. A new model is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import AdapterError
from .adapter import Adapter

MODELS = {"mmdit-shapes": ("mlxquant.models.mmdit_shapes", "MMDiTShapes")}
PLANNED = {"sd3-medium": "needs the DiffusionKit adapter, which comes with a later release of mlxquant"}


def adapter_class(name: str) -> Any:
    """The adapter of a model; raises AdapterError, listing the known names, on an unknown one."""
    if name in PLANNED:
        raise AdapterError(f"model {name!r} {PLANNED[name]}; this release has {sorted(MODELS)}, choose one with --model")
    if name not in MODELS:
        raise AdapterError(f"unknown model {name!r}: neither a folder written by mlxquant nor one of {sorted(MODELS)}")
    module, attribute = MODELS[name]
    return getattr(import_module(module), attribute)


def pretrained(name: str) -> Adapter:
    """A model with its full-precision weights."""
    adapter: Adapter = adapter_class(name).pretrained()
    return adapter
