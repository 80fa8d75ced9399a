"""Switch layers: the weights of many experts in one layer, of which each token meets those that a router chose.

mlx-lm has them as ``SwitchLinear``, and others by the same name: a weight [experts, out, in], called with an input and
the indices of experts. They are told by that, so nothing is imported. The experts are the parts of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import schema
from ..grids.time import Clock
from ..grids.weights import FORMAT, Grid, WeightFormat
from ..numerics.arrays import Array
from ..numerics.layer_inputs import LayerInputs
from ..numerics.low_rank import LowRank
from .names import BIAS, SCALES, WEIGHT
from .packed import BRANCH_DTYPE, name_of, scale_dtype, stored_dtype
from .product import PRODUCT, QuantizedProduct
from .tree import parameters
from .weight_only import rounded

CALL = ("x", "indices", "sorted_indices")  # the arguments of a switch layer


class _Recognised(type):
    def __instancecheck__(cls, module: Any) -> bool:
        """Whether a module is a switch layer, anybody's, in full precision."""
        kind = type(module)
        if not isinstance(module, nn.Module) or not any(base.__name__ == "SwitchLinear" for base in kind.__mro__):
            return False
        weight = module.get(WEIGHT)
        floats = isinstance(weight, mx.array) and weight.ndim == 3 and SCALES not in module
        return floats and tuple(signature(kind.__call__).parameters)[1:] == CALL


class SwitchLinear(nn.Module, metaclass=_Recognised):
    """A switch layer in full precision; whatever is one counts as an instance.

    Args:
        input_dims: Width of an input.
        output_dims: Width of an output.
        num_experts: Experts.
        bias: Whether each has a bias [out].
    """

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, bias: bool = True):
        super().__init__()
        edge = input_dims**-0.5
        self.weight = mx.random.uniform(-edge, edge, (num_experts, output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., m, in] and indices [...] of experts, which broadcast against each other, to [..., m, out]."""
        weight = self.weight.swapaxes(-1, -2)
        y = mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + self.bias[indices][..., None, :] if BIAS in self else y


class QuantizedSwitchLinear(QuantizedProduct):
    """A switch layer with integer weights; its input may be quantized, too.

    Args:
        codes: Codes of all experts, one below the other, uint8 [experts * out, in].
        grid: The levels that the codes stand for.
        experts: How many there are.
        bias: What is added to each expert's outputs [experts, out]; None for nothing.
        branch: What is added to the integer weights, never quantized, ``down`` of all experts one below the other;
            None for nothing.

    Raises:
        AdapterError: Where the branch does not fit the codes.
    """

    replaces = SwitchLinear
    quantizes_inputs = True
    meets_one_part = True
    tells_outputs = False  # a token has outputs of several experts
    pairs_streams = False  # routers of two models may choose other experts
    STRUCTURE = schema.entries(
        {
            "format": FORMAT,
            "shape": schema.array_of(schema.whole(1), 2, 2),
            "experts": schema.whole(1),
            "bias": schema.flag,
        },
        PRODUCT,
    )

    def __init__(
        self, codes: Array, grid: Grid, experts: int, bias: mx.array | None = None, branch: LowRank | None = None
    ):
        super().__init__()
        shape = (experts, len(codes) // experts, codes.shape[1])
        self._lay_out_weight(grid.format, shape, None if bias is None else bias.dtype, stored_dtype(grid))
        self._check_branch(branch)
        told = {} if branch is None else {"rank": branch.rank, BRANCH_DTYPE: name_of(self._branch_dtype(branch))}
        self._lay_out_product(told, None)
        self._fill(codes, grid, **{BIAS: bias, **self._factors(branch)})

    @classmethod
    def from_switch(cls, switch: nn.Module, format: WeightFormat, steps: str = "extremes") -> QuantizedSwitchLinear:
        """What stands for ``switch``, rounded without data; see ``QuantizedConvolution.from_convolution``."""
        codes, grid = rounded(cls.matrix_of(switch), format, steps)
        return cls.of(switch, codes, grid)

    @classmethod
    def is_plain(cls, module: nn.Module) -> bool:
        return isinstance(module, SwitchLinear) and set(parameters(module)) <= {WEIGHT, BIAS}

    @classmethod
    def width_of(cls, shape: Sequence[int]) -> int:
        return shape[-1]

    @classmethod
    def parts_of(cls, module: nn.Module) -> int:
        return int(module.weight.shape[0])

    @classmethod
    def outputs(cls, module: nn.Module) -> int:
        return int(module.weight.shape[1])

    @classmethod
    def reads(cls, module: nn.Module) -> Any:
        return cls, cls.parts_of(module)

    @classmethod
    def read(cls, module: nn.Module, x: mx.array, *where: Any) -> LayerInputs:
        """The tokens of each expert, as one sample."""
        indices, width = where[0], x.shape[-1]
        batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
        tokens = np.asarray(mx.broadcast_to(x.astype(mx.float32), (*batch, *x.shape[-2:]))).reshape(-1, width)
        chosen = np.repeat(np.broadcast_to(np.asarray(indices), batch).ravel(), x.shape[-2])
        parts = [tokens[chosen == expert][None] for expert in range(module.weight.shape[0])]
        return LayerInputs(parts, tokens.min(0, keepdims=True), tokens.max(0, keepdims=True))

    @classmethod
    def of(
        cls,
        module: nn.Module,
        codes: Array,
        grid: Grid,
        divisor: mx.array | None = None,
        rotation: int = 1,
        branch: LowRank | None = None,
    ) -> QuantizedSwitchLinear:
        return cls(codes, grid, module.weight.shape[0], module.bias if BIAS in module else None, branch)

    @property
    def rows(self) -> int:
        return self._shape[0] * self._shape[1]

    @property
    def parts(self) -> int:
        return self._shape[0]

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        return self._shape[:2]

    @property
    def input_dims(self) -> int:
        return self._shape[2]

    @property
    def output_dims(self) -> int:
        return self._shape[1]

    @property
    def num_experts(self) -> int:
        return self._shape[0]

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "format": self._format.to_dict(),
            "shape": [self.rows, self.width],
            "experts": self.parts,
            "bias": BIAS in self,
            **({"bias_dtype": name_of(self[BIAS].dtype)} if BIAS in self else {}),
            **self.scale_facts,
            **self.product_facts,
        }

    @classmethod
    def blank(cls, facts: Mapping[str, Any], clock: Clock | None) -> Self:
        layer = cls._bare()
        bias = getattr(mx, facts.get("bias_dtype", "float32")) if facts["bias"] else None
        rows, width = facts["shape"]
        shape = (facts["experts"], rows // facts["experts"], width)
        layer._lay_out_weight(WeightFormat(**facts["format"]), shape, bias, scale_dtype(facts))
        layer._lay_out_product(facts, clock)
        return layer

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., m, in] and indices [...] of experts, which broadcast against each other, to [..., m, out]."""
        return self.multiplied(x, indices, sorted_indices)

    @staticmethod
    def arguments(*where: Any, **named: Any) -> tuple[Any, ...]:
        indices, *order = (*where, *named.values())
        return indices, bool(order and order[0])

    def meet(self, rows: mx.array, weight: mx.array, *where: Any) -> mx.array:
        indices, in_order = where
        by_expert = weight.reshape(self.parts, -1, weight.shape[-1]).swapaxes(-1, -2)
        return mx.gather_mm(rows, by_expert, rhs_indices=indices, sorted_indices=in_order)

    def by_output(self, values: mx.array, *where: Any) -> mx.array:
        return values.reshape(self.parts, -1)[where[0]][..., None, :]

    def _multiply_packed(self, x: mx.array, scales: mx.array, biases: mx.array, *where: Any) -> mx.array:
        indices, in_order = where
        weight, scales, biases = (v.reshape(self.parts, -1, v.shape[-1]) for v in (self.weight, scales, biases))
        return mx.gather_qmm(
            x,
            weight,
            scales,
            biases,
            rhs_indices=indices,
            transpose=True,
            group_size=self.packed_group,
            bits=self._format.bits,
            sorted_indices=in_order,
        )

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self._format}, bias={BIAS in self}"
