"""MLX's own affine layout: what of a quantized layer a plain ``nn.QuantizedLinear`` can hold, bit for bit, and the way
back.

Nothing is quantized again. Codes are copied, scales repeated over groups that MLX knows, and what a plain layer has no
place for is named, so that whoever writes files for other tools can refuse it. MLX has no 7 bits: such codes are
written with 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..grids.packing import pack
from ..grids.weights import GROUPS, WeightFormat
from .names import BIAS, BIASES, SCALES, WEIGHT
from .own import Obstacle
from .packed import BRANCH_DTYPE, SCALE_DTYPE, QuantizedLayer, scale_dtype

PLAIN = (
    "format",
    "shape",
    "bias",
    "bias_dtype",
    "dtype",
    SCALE_DTYPE,
    BRANCH_DTYPE,
    "experts",
)  # facts of a layer that a plain one shares
ANOTHER_RECIPE = "quantize by a recipe without it"


@dataclass(frozen=True)
class PlainLayer:
    """``arrays``: weight uint32 [out, words], scales and biases [out, in / group_size], bias [out] optional, by these
    names.
    """

    bits: int
    group_size: int
    arrays: dict[str, mx.array]

    @property
    def setting(self) -> dict[str, Any]:
        """As MLX's ``to_quantized`` takes it, and mlx-lm's config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


def obstacles(facts: Mapping[str, Any]) -> list[Obstacle]:
    """Everything that keeps a linear layer, or a switch layer, of these facts from being a plain one; empty where
    ``plain_layer`` stands for it.
    """
    known = {
        "table": ("static activation scales", "quantize with 16-bit activations"),
        "token": ("activations quantized a token", "quantize with 16-bit activations"),
        "divisor": ("a division of its input's channels", ANOTHER_RECIPE),
        "rotation": (f"a rotation of its input in blocks of {facts.get('rotation')}", ANOTHER_RECIPE),
        "rank": (f"a low-rank branch of rank {facts.get('rank')}", ANOTHER_RECIPE),
    }
    found = (
        []
        if group_size(facts)
        else [Obstacle(f"{facts['shape'][1]} input channels, no multiple of {GROUPS[0]}", "leave it unquantized")]
    )
    for name, value in facts.items():
        if (
            value in (None, False, 0) or (name == "rotation" and value == 1) or name in (*PLAIN, "log", "network")
        ):  # the last two come with a table
            continue
        what, remedy = known.get(name, (f"{name} {value}", ANOTHER_RECIPE))
        found.append(Obstacle(what, remedy, name in ("table", "token")))
    return found


def group_size(facts: Mapping[str, Any]) -> int | None:
    """Input columns that share a scale once the layer is plain: its own group, or the largest of MLX's that divides its
    width.
    """
    group = facts["format"]["group"]
    return group if isinstance(group, int) else next((g for g in reversed(GROUPS) if facts["shape"][1] % g == 0), None)


def plain_layer(layer: QuantizedLayer) -> PlainLayer:
    """The integer weight of a layer that ``group_size`` knows a group for, and its bias; nothing else that it may have.

    Scales and biases are float16 and exact: a symmetric grid's bias is its scale times a power of two. Where one leaves
    float16's range they are float32, and so are those of an embedding that is not float16: MLX looks its rows up in the
    dtype of the scales.
    """
    size, width = group_size(layer.facts), layer.width
    assert size is not None
    bits = plain_bits(layer.format)
    weight = layer.weight if bits == layer.format.bits else mx.array(pack(layer.codes(), bits))
    grid = layer.grid()
    fits = (
        grid.dtype is np.float16
        and bool((np.abs(grid.biases) <= np.finfo(np.float16).max).all())
        and layer.facts.get("dtype", "float16") == "float16"
    )
    dtype = np.float16 if fits else np.float32
    scales, biases = (
        mx.array(np.repeat(v.astype(dtype), width // size // v.shape[1], axis=1)) for v in (grid.scales, grid.biases)
    )  # a row's scale, over its groups
    arrays = {WEIGHT: weight, SCALES: scales, BIASES: biases}
    if layer.meets_one_part:  # experts stand side by side there
        arrays = {name: value.reshape(layer.parts, -1, value.shape[-1]) for name, value in arrays.items()}
    return PlainLayer(bits, size, arrays | ({BIAS: layer[BIAS]} if BIAS in layer else {}))


def plain_bits(format: WeightFormat) -> int:
    """Bits of a code in MLX's layout."""
    return 8 if format.bits == 7 else format.bits


def restored(arrays: Mapping[str, mx.array], layers: Mapping[str, Any], plain: Iterable[str]) -> dict[str, mx.array]:
    """A model's arrays with the layers at the paths ``plain`` in our layout again; ``layers`` has the structure of
    each, by path.

    The inverse of ``plain_layer``, but for 7 bits. Raises KeyError where a layer is not described, or one of its
    tensors not there.
    """
    own = dict(arrays)
    for path in plain:
        format, (rows, width) = WeightFormat(**layers[path]["format"]), layers[path]["shape"]
        groups, kept = width // format.columns(width), 1 if format.group == "tensor" else rows
        if "experts" in layers[path]:
            for name in (f"{path}.{part}" for part in (WEIGHT, SCALES, BIASES)):
                own[name] = own[name].reshape(rows, -1)
        for name in (f"{path}.{SCALES}", f"{path}.{BIASES}"):
            own[name] = own[name][:kept, :: own[name].shape[1] // groups].astype(scale_dtype(layers[path]))
        if format.symmetric:
            del own[f"{path}.{BIASES}"]
    return own
