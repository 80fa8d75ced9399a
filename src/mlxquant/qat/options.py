"""Every switch of quantization-aware training, from one table: which tensors are quantized, how, and with how many
bits.

Names go from the whole to the part: what is rounded (a linear, attention, the MLP, an embedding), which of its tensors,
and the setting. An option that is not given follows another one, or has a default; an option that is given always
counts, also an explicit no. That is the one rule, and ``QuantizationOptions`` applies it to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import RecipeError
from ..methods import registry
from ..methods.fake_quantizers import Quantizer

POINTS = {  # where an activation can be quantized: the seams of a GPT's blocks, in the order in which tensors pass them
    "attn": (
        "input", "qk_mult_q_input", "qk_mult_k_input", "softmax_input", "pv_mult_p_input", "pv_mult_v_input",
        "pv_mult_output", "output",
    ),
    "mlp": ("input", "activation_input", "activation_output", "output"),
}  # fmt: skip
EMBEDDINGS = ("wte", "wpe")
LINEAR, QUANTIZED = "linear", "quantized_linear"
STEP, RAMP = "step", "linear"
TENSOR, TOKEN = "tensor", "token"


@dataclass(frozen=True)
class Projection:
    """A matrix of a block: its global option's group, its Linear, and which of that Linear's equal parts of
    rows it is.
    """

    group: str
    path: str
    part: int = 0
    parts: int = 1


PROJECTIONS = {
    "q": Projection("attn", "attn.c_attn", 0, 3),
    "k": Projection("attn", "attn.c_attn", 1, 3),
    "v": Projection("attn", "attn.c_attn", 2, 3),
    "attn_proj": Projection("attn", "attn.c_proj"),
    "mlp_up": Projection("mlp", "mlp.c_fc"),
    "mlp_down": Projection("mlp", "mlp.c_proj"),
}


@dataclass(frozen=True)
class Option:
    """A switch: ``kind`` says what values it takes, ``follows`` whose value it has where it is not given, if not
    ``default``.
    """

    name: str
    kind: Literal["flag", "bits", "count", "choice"]
    help: str
    default: Any = None
    follows: str | None = None
    choices: tuple[str, ...] = ()
    special: bool = False  # one of many alike, which a short help leaves out


def _points() -> list[Option]:
    found = []
    for group, points in POINTS.items():
        every, bits = f"quantize_{group}_act", f"quantize_{group}_act_bits"
        found.append(Option(every, "flag", f"Quantize the activations at all points of {group}.", default=False))
        found.append(Option(bits, "bits", f"Bits of {group} activations.", default=8))
        for point in points:
            name = f"quantize_{group}_act_{point}"
            found.append(Option(name, "flag", f"Quantize {group}.{point}.", follows=every, special=True))
            found.append(Option(f"{name}_bits", "bits", f"Bits of {group}.{point}.", follows=bits, special=True))
    return found


def _linears(methods: tuple[str, ...]) -> list[Option]:
    variants = (LINEAR, QUANTIZED)
    found = []
    for group in POINTS:
        what = f"What the matrices of {group} are."
        found.append(Option(f"linear_variant_{group}", "choice", what, default=LINEAR, choices=variants))
    found.append(
        Option(
            "quantize_linear_method", "choice", "How weights are quantized.", default="symmetric_quant", choices=methods
        )
    )
    found.append(Option("quantize_linear_bits", "bits", "Bits of weights.", default=8))
    for name, projection in PROJECTIONS.items():
        what, follows = f"Of {name}, in {projection.path}.", f"linear_variant_{projection.group}"
        found.append(Option(f"linear_variant_{name}", "choice", what, follows=follows, choices=variants, special=True))
    for name in PROJECTIONS:
        found += _own(f"quantize_linear_{name}", methods)
    for name in EMBEDDINGS:
        found.append(Option(f"quantize_{name}", "flag", f"Quantize the embedding {name}.", default=False, special=True))
        found += _own(f"quantize_{name}", methods)
    return found


def _own(name: str, methods: tuple[str, ...]) -> list[Option]:
    """A weight's own method and bits."""
    return [
        Option(
            f"{name}_method", "choice", "Its method.", follows="quantize_linear_method", choices=methods, special=True
        ),
        Option(f"{name}_bits", "bits", "Its bits.", follows="quantize_linear_bits", special=True),
    ]


def _general(methods: tuple[str, ...]) -> list[Option]:
    return [
        Option(
            "activations_quant_method",
            "choice",
            "How activations are quantized.",
            default="affine_quant",
            choices=methods,
        ),
        Option("activations_quant_scale", "choice", "What shares a scale.", default=TENSOR, choices=(TENSOR, TOKEN)),
        Option("store_activations", "flag", "Keep the last quantized activations, and save them.", default=False),
        Option("quantization_warmup_iters", "count", "Iterations before anything is quantized.", default=100),
        Option(
            "quantization_level_schedule",
            "choice",
            "How quantization sets in then.",
            default=STEP,
            choices=(STEP, RAMP),
        ),
        Option("full_quant_iteration", "count", "When it is complete, with a linear schedule."),
    ]


def _table() -> dict[str, Option]:
    methods = tuple(method.name for method in registry.members("fake"))
    return {option.name: option for option in (*_linears(methods), *_points(), *_general(methods))}


OPTIONS = _table()


@dataclass(frozen=True)
class QuantizationOptions:
    """What was given, by option. Raises RecipeError on unknown options and impossible values."""

    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if name not in OPTIONS:
                raise RecipeError(
                    f"unknown quantization option {name!r}; 'mlxquant train-gpt --list-quantization' lists all"
                )
            option = OPTIONS[name]
            if option.choices and value not in option.choices:
                raise RecipeError(f"{name}: expected one of {list(option.choices)}, found {value!r}")
            if option.kind == "bits" and not 2 <= value <= 8:
                raise RecipeError(f"{name}: bits must be 2 to 8, found {value}")
        ramp, full = self["quantization_level_schedule"] == RAMP, self["full_quant_iteration"]
        if ramp != (full is not None) or (ramp and full <= self["quantization_warmup_iters"]):
            raise RecipeError(
                f"full_quant_iteration is {full}; a linear quantization_level_schedule needs one after the "
                f"{self['quantization_warmup_iters']} iterations of warm-up, and no other schedule has one"
            )

    def __getitem__(self, name: str) -> Any:
        """The value of an option: as given, else of the one it follows, else its default."""
        option = OPTIONS[name]
        if (value := self.given.get(name)) is not None:
            return value
        return self[option.follows] if option.follows else option.default

    def activation(self, group: str, point: str) -> Quantizer | None:
        """How the activation at a point is quantized, if it is."""
        name = f"quantize_{group}_act_{point}"
        return Quantizer(self["activations_quant_method"], self[f"{name}_bits"]) if self[name] else None

    def projection(self, name: str) -> Quantizer | None:
        """How the weight of a projection is quantized, if it is."""
        return self._weight(f"quantize_linear_{name}") if self[f"linear_variant_{name}"] == QUANTIZED else None

    def embedding(self, name: str) -> Quantizer | None:
        """How an embedding is quantized, if it is."""
        return self._weight(f"quantize_{name}") if self[f"quantize_{name}"] else None

    def _weight(self, name: str) -> Quantizer:
        return Quantizer(self[f"{name}_method"], self[f"{name}_bits"])

    @cached_property
    def anything(self) -> bool:
        """Whether anything is quantized at all."""
        points = (self.activation(group, point) for group, names in POINTS.items() for point in names)
        return any((*points, *map(self.projection, PROJECTIONS), *map(self.embedding, EMBEDDINGS)))

    def to_dict(self) -> dict[str, Any]:
        """Every option with the value that counts: what a result depends on."""
        return {name: self[name] for name in OPTIONS}
