"""Open an attention that computes its probabilities in a function, in code of anybody's.

Where a module calls MLX's ``scaled_dot_product_attention`` there is no place in the tree at which another attention
could stand. So the module gets a ``SoftmaxAttention`` of its own, and a class, derived from the one that it had, whose
calls find that in the place of the function. The function's name is looked up among the globals of the code that calls
it, and it is as it was between calls.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import SoftmaxAttention

PLACE = "softmax_attention"  # of the attention in its module


def open_attention(module: nn.Module, functions: dict[str, Any], name: str = "scaled_dot_product_attention") -> None:
    """Let the attention in a module be found, at ``PLACE`` in it, and be another; what it computes stays the same.

    Args:
        module: What calls the function once in each of its own calls, itself or through other functions.
        functions: The globals of the code that calls it (``vars`` of that Python module).
        name: Of the function there; it is called as MLX's own is.
    """
    if PLACE in module:
        return
    kind: Any = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def opened(
            q: mx.array, k: mx.array, v: mx.array, *, scale: Any = None, mask: mx.array | None = None
        ) -> mx.array:
            wrote: mx.array = self[PLACE](q, k, v, scale, mask)
            return wrote

        before = functions[name]
        functions[name] = opened
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            functions[name] = before

    module[PLACE] = SoftmaxAttention()
    module.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__}
    )
