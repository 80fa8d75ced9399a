"""What of some contents can be drawn: weights, their codes, inputs of layers over time, steps and bits of tables, any
other array.

A view reads its numbers when it is asked for them, one tensor at a time; of tensors that are very large it takes every
n-th row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..layers.names import BIAS, BRANCH, DIVISOR
from ..numerics.arrays import Array
from ..pipeline.activation_stats import ActivationStats
from .arrays import StoredArray
from .coded import CodedTensor, coded_tensors
from .layers import DIVIDES, StoredLayer, without_parts
from .reader import Contents

LARGEST = 2**24  # numbers of a tensor that are read


@dataclass(frozen=True)
class View:
    """``matrix()`` gives float32 [rows, columns], ``samples()`` the numbers to count, by a label each ("" where there
    is one lot).

    ``rows`` and ``columns`` say what the axes are. ``levels`` are the first and last code of a grid, None for what is
    not on one.
    """

    name: str
    kind: str
    rows: str
    columns: str
    matrix: Callable[[], Array]
    samples: Callable[[], list[tuple[str, Array]]]
    levels: tuple[int, int] | None = None
    note: str = ""


def views(contents: Contents) -> list[View]:
    """Everything that can be drawn, in the order of the contents."""
    found = [view for layer in contents.layers for view in _of_layer(layer)]
    if contents.statistics is not None:
        found += [_of_inputs(contents.statistics, path) for path in contents.statistics.leaders]
    else:
        plain = without_parts(contents.arrays, contents.layers)
        coded = coded_tensors(plain)
        parts = {id(part) for tensor in coded for part in tensor.parts.values()}
        found += [view for tensor in coded for view in _of_coded(tensor)]
        found += [_of_array(array) for array in plain if id(array) not in parts and array.readable and array.size]
    return found + _of_tables(contents)


def _of_layer(layer: StoredLayer) -> list[View]:
    stride = stride_for(layer.shape)
    format = layer.format
    first, last = -format.zero_code, format.levels - 1 - format.zero_code
    note = f"{format}, {layer.bits_per_weight:.2f} bits per weight{_strided(stride)}"
    others = [_of_array(layer.parts[name]) for name in (BIAS, DIVISOR, DIVIDES, *BRANCH) if name in layer.parts]
    return [
        _of_values(f"{layer.path}.weight", "weight", lambda: layer.weight(stride), "output", "input", None, note),
        _of_values(f"{layer.path}.codes", "codes", lambda: layer.codes(stride), "output", "input", (first, last), note),
        *others,
    ]


def _of_coded(tensor: CodedTensor) -> list[View]:
    stride, bits = stride_for(tensor.shape), tensor.bits()
    names = ("output", "input") if len(tensor.shape) == 2 else ("other axes", "last axis")
    note = f"{bits} bits, {'x'.join(map(str, tensor.shape))}{_strided(stride)}"
    levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return [
        _of_values(
            f"{tensor.name}.values",
            "values",
            lambda: tensor.values(stride).reshape(-1, tensor.shape[-1]),
            *names,
            None,
            note,
        ),
        _of_values(
            f"{tensor.name}.codes",
            "codes",
            lambda: tensor.codes(stride).reshape(-1, tensor.shape[-1]),
            *names,
            levels,
            note,
        ),
    ]


def _of_array(array: StoredArray) -> View:
    stride = stride_for(array.shape)

    def read() -> Array:
        values = array.read(stride)
        return values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)

    names = ("first axis", "other axes") if len(array.shape) > 1 else ("", "index")
    shape = "x".join(map(str, array.shape)) or "scalar"
    return _of_values(array.name, "array", read, *names, None, f"{array.dtype} {shape}{_strided(stride)}")


def _of_values(
    name: str, kind: str, read: Callable[[], Array], rows: str, columns: str, levels: tuple[int, int] | None, note: str
) -> View:
    return View(
        name, kind, rows, columns, lambda: read().astype(np.float32), lambda: [("", read().reshape(-1))], levels, note
    )


def _of_inputs(stats: ActivationStats, path: str) -> View:
    """A layer's input: every channel's largest magnitude at each noise level, and the sampled values, one lot a noise
    level.
    """

    def matrix() -> Array:
        seen = stats.ranges(path)
        peaks: Array = np.maximum(np.abs(seen.least), np.abs(seen.most))
        return peaks[::-1]

    def samples() -> list[tuple[str, Array]]:
        seen = stats.ranges(path)
        return [
            (f"sigma {sigma:.3g}", rows.reshape(-1))
            for sigma, rows in zip(seen.sigma[::-1], seen.rows[::-1], strict=True)
        ]

    return View(
        f"{path}.input",
        "activation",
        "noise level, from noise to picture",
        "channel",
        matrix,
        samples,
        None,
        "largest magnitude",
    )


def _of_tables(contents: Contents) -> list[View]:
    """Steps and bits of all activation tables, [layers, noise levels], where they have as many noise levels each."""
    if contents.config is not None:
        tables = [(table.step, table.bits) for table in contents.config.plain.values()]
    else:
        tables = [(found[1], found[2]) for layer in contents.layers if (found := layer.table())]
    if not tables or len({len(steps) for steps, _ in tables}) > 1:
        return []
    drawn = []
    for place, what in enumerate(("step", "bits")):
        values = np.stack([table[place] for table in tables])[:, ::-1].astype(np.float32)
        note = "layers in the order of 'mlxquant inspect --each'"
        reader = _constant(values)
        drawn.append(
            _of_values(
                f"activations.{what}", "table", reader, "layer", "noise level, from noise to picture", None, note
            )
        )
    return drawn


def _constant(values: Array) -> Callable[[], Array]:
    return lambda: values


def stride_for(shape: Sequence[int]) -> int:
    """Every how many rows are read of a tensor of this shape."""
    size = int(np.prod(shape, dtype=np.int64))
    return max(1, -(-size // LARGEST)) if shape else 1


def _strided(stride: int) -> str:
    return "" if stride == 1 else f"; every {stride}th row"
