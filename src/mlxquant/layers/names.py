"""The names of a quantized module's parameters, which are the format of our files.

This is the only place that spells them. Who has a layer asks its methods; who has only a file takes the names from
here.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..grids.tables import ActivationTable

WEIGHT, SCALES, BIASES = INTEGERS = ("weight", "scales", "biases")  # codes; what they are multiplied by, what is added
BIAS = "bias"
UP, DOWN = BRANCH = ("low_up", "low_down")
DIVISOR = "act_divisor"
TABLE = {  # in the order of ActivationTable's fields
    "act_sigma": mx.float32,
    "act_step": mx.float32,
    "act_shift": mx.float32,
    "act_bits": mx.uint8,
    "act_log": mx.uint8,
}
SIGMA, STEP, SHIFT, BITS, LOG = TABLE
TOKEN = "act_token"
FOR_WEIGHT = (*INTEGERS, *BRANCH)  # what is stored for a weight's numbers
FOR_INPUT = (*TABLE, TOKEN)  # what says how an input is quantized


def lay_out_table(module: nn.Module, entries: int, shifts: int, log: bool) -> None:
    """The parameters of a table of ``entries`` noise levels with ``shifts`` shifts each, zero and not evaluated."""
    for name, dtype in TABLE.items():
        if name != LOG or log:
            module[name] = mx.zeros((entries, shifts) if name == SHIFT else (entries,), dtype)


def store_table(module: nn.Module, table: ActivationTable) -> None:
    """Make a table parameters of a module; which entries are logarithmic is stored only where one is."""
    values = (table.sigma, table.step, table.shift, table.bits, table.log)
    for (name, dtype), value in zip(TABLE.items(), values, strict=True):
        if name != LOG or table.log.any():
            module[name] = mx.array(value, dtype)


def stored_table(module: nn.Module) -> ActivationTable:
    """The inverse of ``store_table``."""
    return ActivationTable(*(np.array(module[name]) for name in TABLE if name in module))
