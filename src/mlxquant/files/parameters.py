"""A module's parameters on their way from and to files: put in where they fit exactly, stored in 16 bits where that
loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ArtifactError
from .array_memory import ArrayMemory


def load_parameters(module: nn.Module, arrays: Mapping[str, mx.array], source: str) -> None:
    """Put arrays into a module, in the dtypes that it has; raises ArtifactError on a missing, extra or misshapen
    tensor.
    """
    expected = dict(tree_flatten(module.parameters()))
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        counts = f"{len(missing)} and {len(extra)} in all"
        raise ArtifactError(
            f"{source}: does not fit the model: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}"
            f" ({counts}); the file or its config is another model's, or damaged: get both again"
        )
    for name, value in expected.items():
        if arrays[name].shape != value.shape:
            raise ArtifactError(f"{source}: {name} has shape {arrays[name].shape}, the model expects {value.shape}")
    module.load_weights([(name, arrays[name].astype(value.dtype)) for name, value in expected.items()])


def compact(value: mx.array) -> mx.array:
    """float32 as float16 where that loses nothing; the result is not evaluated."""
    return value.astype(mx.float16) if value.dtype == mx.float32 and _fits_float16(value) else value


@ArrayMemory
def _fits_float16(value: mx.array) -> bool:
    return bool(mx.array_equal(value.astype(mx.float16).astype(mx.float32), value).item())
