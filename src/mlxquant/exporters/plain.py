"""A module as other tools read one: every quantized layer in MLX's own layout, or one clear refusal.

What a tool cannot express is refused, by name. Activation scales alone may be left out, when that is asked for, because
the weights are whole without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ExportError
from ..grids.weights import SMALLEST_HALF
from ..layers.attention import QuantizedAttention
from ..layers.names import BIASES, FOR_INPUT, SCALES, WEIGHT
from ..layers.own import Obstacle, OwnModule
from ..layers.plain import PlainLayer, plain_layer
from ..layers.product import QuantizedProduct
from ..layers.sizes import numbers_in, numbers_in_words
from ..layers.tree import parameters

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

Setting = dict[str, Any]


@dataclass(frozen=True)
class PlainModule:
    """``arrays`` are all parameters by path. ``layers`` has group size, bits and mode of what is quantized,
    ``unquantized`` the paths of layers that MLX could quantize and that are not; ``notes`` say in words what is other
    than in the module. ``beside`` are bytes and weights of what is stored in a file of ours.
    """

    arrays: dict[str, mx.array]
    layers: dict[str, Setting] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beside: tuple[int, int] = (0, 0)

    @property
    def weights(self) -> int:
        """Parameters, counted as mlx-lm counts them: those of a quantized layer before they were quantized."""
        words = {path: self.arrays.get(f"{path}.{WEIGHT}") for path in self.layers}
        packed = {
            path: 0 if found is None else numbers_in_words(found, self.layers[path]["bits"])
            for path, found in words.items()
        }
        return self.beside[1] + numbers_in(self.arrays.items(), packed)

    @property
    def nbytes(self) -> int:
        return self.beside[0] + sum(value.nbytes for value in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters, as mlx-lm prints it."""
        return 8 * self.nbytes / self.weights

    @property
    def usual(self) -> Setting | None:
        """The setting that most quantized layers have; None where nothing is quantized."""
        counts = Counter(tuple(setting.items()) for setting in self.layers.values())
        return dict(counts.most_common(1)[0][0]) if counts else None

    def as_dtype(self, name: str, others: Mapping[str, mx.Dtype] = MappingProxyType({})) -> PlainModule:
        """With every floating tensor in one dtype, but for those that ``others`` say another of; raises ExportError
        where a value does not fit.
        """
        arrays, change = dict(self.arrays), self.scale_change(FLOATS[name])
        for key, value in self.arrays.items():
            if not mx.issubdtype(value.dtype, mx.floating):
                continue
            dtype = others.get(key, FLOATS[name])
            arrays[key] = value.astype(dtype)
            if mx.isfinite(value).all().item() != mx.isfinite(arrays[key]).all().item():
                raise ExportError(f"{key}: holds values that {name} cannot; leave --dtype out, or use float32")
            if leaf(key) == SCALES and dtype == mx.float16 != value.dtype and (least := lost_scale(value)):
                raise ExportError(
                    f"{key}: holds scales of {least:.1e}, where {name} has fewer digits than its weights need; leave"
                    " --dtype out, or use bfloat16 or float32"
                )
        cost = sum(v.nbytes for v in arrays.values()) - self.nbytes
        notes = [f"floating tensors as {name}: {cost / 1e6:+.3f} MB"]
        if change:
            notes.append(
                f"scales are no longer the calibrated ones: up to {change:.1e} of their value away; the codes are"
            )
        return replace(self, arrays=arrays, notes=[*self.notes, *notes])

    def scale_change(self, dtype: mx.Dtype) -> float:
        """By which share of it a scale would change at most in a dtype: 0 in bfloat16 where formats say ``-bf16``."""
        scales = [value for name, value in self.arrays.items() if leaf(name) == SCALES]
        return max([relative_change(value, value.astype(dtype)) for value in scales], default=0.0)

    def mixed_dtypes(self) -> str:
        """What a tool will do with float16 or float32 scales beside bfloat16 tensors, in words; empty where there are
        no such two.
        """
        scales = {value.dtype for name, value in self.arrays.items() if leaf(name) == SCALES}
        others = {value.dtype for name, value in self.arrays.items() if leaf(name) not in (SCALES, BIASES)}
        finer = next((name for name in ("float16", "float32") if FLOATS[name] in scales), None)
        if finer is None or mx.bfloat16 not in others:
            return ""
        exact = self.scale_change(mx.bfloat16) == 0
        remedy = "bfloat16" if exact else "float16" if finer == "float16" else None
        return f"MLX promotes {finer} scales times bfloat16 inputs to float32: exact, but slower" + (
            f"; --dtype {remedy} avoids that" if remedy else ""
        )


def plain_module(module: nn.Module, target: str, drop_activations: bool = False) -> PlainModule:
    """All of a module in MLX's own layout. Raises ExportError, naming the layer, on what ``target`` has no
    place for.
    """
    arrays, layers, unquantized, found = parameters(module), {}, [], {}
    dropped = widened = 0
    wide = list[mx.array]()
    for path, part in sorted(module.named_modules()):
        if here := [o for o in part_obstacles(part) if not (drop_activations and o.activations)]:
            found[path] = here
            continue
        if isinstance(part, QuantizedProduct | QuantizedAttention):
            own = [name for name in arrays if name.startswith(f"{path}.")]
            dropped += any(name in part for name in FOR_INPUT)
            for name in own:
                del arrays[name]
        if isinstance(part, QuantizedProduct):
            plain = plain_layer(part)
            widened += plain.bits != part.format.bits
            wide += [plain.arrays[SCALES]] if plain.arrays[SCALES].dtype == mx.float32 else []
            arrays |= placed(path, plain)
            layers[path] = plain.setting
        elif SCALES in part and hasattr(part, "group_size"):  # MLX's own quantized layers
            layers[path] = {"group_size": part.group_size, "bits": part.bits, "mode": part.mode}
        elif hasattr(part, "to_quantized"):
            unquantized.append(path)
    if found:
        raise ExportError(refusal(found, target))
    notes = [f"activation scales of {dropped} modules left out"] if dropped else []
    if wide:
        cost = sum(scales.nbytes for scales in wide) / 1e6  # biases are as wide
        notes.append(
            f"scales of {len(wide)} layers as float32, {cost:.3f} MB more: float16 is too small, or the dtype of an"
            " embedding"
        )
    notes += [f"7-bit codes written with 8 bits in {widened} layers: MLX has no 7 bits"] if widened else []
    return PlainModule(arrays, layers, unquantized, notes)


def relative_change(before: mx.array, after: mx.array) -> float:
    """The largest change of a value, as a share of it."""
    exact = before.astype(mx.float32)
    change = mx.abs(after.astype(mx.float32) - exact) / mx.where(exact == 0, 1.0, mx.abs(exact))
    return float(np.array(change.max()))


def lost_scale(scales: mx.array) -> float | None:
    """The least of some scales where float16 has not all its digits for it, and it is not 0."""
    values = np.abs(np.array(scales.astype(mx.float32)))
    small = values[(values > 0) & (values < SMALLEST_HALF)]
    return float(small.min()) if small.size else None


def leaf(name: str) -> str:
    """A parameter's name in the module that holds it."""
    return name.rpartition(".")[2]


def placed(path: str, layer: PlainLayer) -> dict[str, mx.array]:
    """A layer's arrays under their full paths."""
    return {f"{path}.{name}": value for name, value in layer.arrays.items()}


def prepared(
    module: nn.Module,
    target: str,
    drop_activations: bool,
    dtype: str | None,
    others: Mapping[str, mx.Dtype] = MappingProxyType({}),
) -> PlainModule:
    """``plain_module`` in one dtype, or in those that it has, with a note where a tool computes more slowly for it."""
    plain = plain_module(module, target, drop_activations)
    if dtype is not None:
        return plain.as_dtype(dtype, others)
    warning = plain.mixed_dtypes()
    return replace(plain, notes=[*plain.notes, warning]) if warning else plain


def part_obstacles(part: nn.Module) -> list[Obstacle]:
    """What keeps one module, without those inside of it, from being a plain one."""
    return part.obstacles() if isinstance(part, OwnModule) else []


def refusal(found: Mapping[str, list[Obstacle]], target: str) -> str:
    """One line on all of them: the first in full, and how many more there are."""
    path, first = next(iter(found.items()))
    more = f" (as have {len(found) - 1} more layers)" if len(found) > 1 else ""
    instead = ", or pass --drop-activations to write the weights alone" if all(o.activations for o in first) else ""
    what = " and ".join(o.what for o in first)
    return f"{path} has {what}{more}, which {target} has no place for; {first[0].remedy}{instead}"


def write_shards(
    folder: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str], name: str, limit: int
) -> dict[str, str]:
    """Write arrays as safetensors files of at most ``limit`` bytes each, or one tensor; returns which file holds which.

    ``name`` is a file's, with ``{index}`` from 0, ``{number}`` from 1 and ``{count}`` in it.
    """
    shards: list[dict[str, mx.array]] = []
    size = 0
    for key, value in arrays.items():
        if not shards or size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    where: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = name.format(index=index, number=index + 1, count=len(shards))
        mx.save_safetensors(str(folder / file), shard, metadata)
        where |= dict.fromkeys(shard, file)
    return dict(sorted(where.items()))
