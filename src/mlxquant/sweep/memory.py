"""Memory that nobody holds any more, given back to the system: MLX keeps buffers for later, and so does Linux' malloc,
in which a model's weights would stay long after they were replaced.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import mlx.core as mx


def give_back() -> None:
    """Give back what is kept for later. It takes milliseconds: after a stage, not after an array."""
    mx.clear_cache()
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    """malloc_trim of glibc, None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
