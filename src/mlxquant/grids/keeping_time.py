"""A module that sets its clock by itself: layers with a table for each noise level then run in anybody's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CalibrationError, reason
from ..numerics.arrays import Array
from .time import Clock

Time = Callable[..., Any]


def noise_levels(time: Time, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> Array:
    """What ``time`` says of a call, float64, whatever it returns: numbers, or arrays of any dtype.

    Args:
        time: See ``keep_time``.
        args: What the module is called with.
        kwargs: What it is called with by name.
        where: What to call the call in an error.

    Raises:
        CalibrationError: It cannot say; what it raised is in the message.
    """
    try:
        given = time(*args, **kwargs)
        return np.asarray(given.astype(mx.float32) if isinstance(given, mx.array) else given, np.float64)
    except Exception as error:  # anybody's function
        raise CalibrationError(
            f"{where}: time= reads no noise level from it ({reason(error)}); it is called with what the module is"
            " called with, which has to have values: outside of mx.vmap, and under mx.disable_compile()"
        ) from error


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
        with clock.at(noise_levels(time, args, kwargs, f"a call of {kind.__name__}").astype(np.float32)):
            return kind.__call__(self, *args, **kwargs)

    module.__class__ = type(
        kind.__name__,
        (kind,),
        {"__call__": call, "_keeps_time_for": kind, "__doc__": kind.__doc__, "__module__": kind.__module__},
    )


def keeps_time(module: nn.Module) -> bool:
    """Whether a module sets a clock by its calls, for which those need values: compiled code has none."""
    return hasattr(type(module), "_keeps_time_for")
