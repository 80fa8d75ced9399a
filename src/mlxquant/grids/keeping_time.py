"""A module that sets its clock by itself: layers with a table for each noise level then run in anybody's pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import numpy as np

from .time import Clock

Time = Callable[..., Any]


def keep_time(module: nn.Module, clock: Clock, time: Time) -> None:
    """Let a module set ``clock`` around each of its calls.

    The module gets a class of its own, derived from the one it had and of the same name, for that is the only place
    where Python looks for what a call does. Where it keeps time already it goes by the new clock from now on.

    Args:
        module: What is called in a pipeline.
        clock: The one that its quantized layers read.
        time: Called with the arguments of a call, returns its noise level in [0,1], or one for each sample [B].
    """
    kind: Any = getattr(type(module), "_keeps_time_for", type(module))

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with clock.at(np.asarray(time(*args, **kwargs), np.float32)):
            return kind.__call__(self, *args, **kwargs)

    module.__class__ = type(
        kind.__name__,
        (kind,),
        {"__call__": call, "_keeps_time_for": kind, "__doc__": kind.__doc__, "__module__": kind.__module__},
    )
