"""Quantize the weights of any MLX module in place, without data: ``quantize_linears``.

Rounding to nearest needs no model that runs and no inputs, so it works for language models, detectors and modules that
nobody has an adapter for. With calibration data there are better ways (``quantize``), and activations are quantized
only there.

A module that reads the weight of a layer itself, in place of calling the layer, has to be excluded: it would read
codes. So do gemma3n of mlx-lm with ``prediction_coefs`` and ``correction_coefs``, and muse_spark with ``lm_head``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MlxQuantError, RecipeError
from ..grids.weights import WeightFormat
from ..recipes.grammar import parse_spec
from ..recipes.patterns import Pattern, as_list, first, require_matches
from .convolutions import QuantizedConvolution
from .kinds import Kind, kind_of
from .packed import QuantizedLayer
from .sizes import KeptLayer, LayerSize, SizeReport, is_hidden, is_packed, stored_bytes, weight_count
from .tree import module_of, parameters, set_module

KEPT = "the recipe keeps it"  # the reason for what a recipe could have taken
Predicate = Callable[[str, nn.Module], bool | Mapping[str, Any]]


@dataclass(frozen=True)
class Held:
    """A module and all paths under which the model holds it; ``kind`` is the one that can stand for it, if any."""

    module: nn.Module
    paths: tuple[str, ...]
    kind: Kind | None

    @property
    def path(self) -> str:
        return self.paths[0]


@dataclass(frozen=True)
class Selection:
    """What the caller, and the ``model`` itself by ``wanted``, want to be quantized."""

    model: nn.Module
    exclude: list[Pattern]
    include: list[Pattern] | None = None
    embeddings: bool = False
    convolutions: bool = False

    def wanted(self, path: str, module: nn.Module) -> bool | Mapping[str, Any]:
        """mlx-lm's question: whether, or with which bits and group size, the model has a layer quantized."""
        predicate: Predicate | None = getattr(self.model, "quant_predicate", None)
        return True if predicate is None else predicate(path, module)

    def reason_to_keep(self, one: Held) -> str | None:
        """Why a module stays as it is; None when it is to be quantized."""
        if is_packed(one.module):
            return "quantized already"
        if is_hidden(one.path):
            return "hidden, it is none of the model's parameters"
        if one.kind is None:
            return f"no quantized form of {type(one.module).__name__} here"
        base = one.kind.replaces
        if base is nn.Embedding and not self.embeddings:
            return "embeddings=True takes embeddings"
        if issubclass(one.kind.form, QuantizedConvolution) and not self.convolutions:
            return "convolutions=True takes convolutions"
        if not one.kind.form.is_plain(one.module):
            return f"computes something else than nn.{base.__name__}"
        if one.module.weight.size == 0:
            return "its weight is empty"
        if (pattern := first(self.exclude, one.paths)) is not None:
            return f"excluded by {pattern!r}"
        if self.include is not None:
            return "not included" if first(self.include, one.paths) is None else None
        return (
            None
            if all(self.wanted(path, one.module) for path in one.paths)
            else "refused by the model's own quant_predicate"
        )


def quantize_linears(
    model: Any,
    format: str = "w8a16",
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    include: Pattern | Iterable[Pattern] | None = None,
    embeddings: bool = False,
    convolutions: bool = True,
    steps: str = "extremes",
    fallback: str | None = None,
) -> SizeReport:
    """Put quantized layers in the place of a model's ``nn.Linear``, its convolutions, the switch layers of its experts
    and, if wanted, its embeddings.

    Layers keep running in the dtype of their input; embeddings answer in their own. The same layer at two places stays
    one layer, and layers that share a weight share its codes; one that shares its weight with something that stays as
    it is, stays, too. A model with a ``quant_predicate``, as mlx-lm's models have, is asked: what it refuses stays
    unless it is included by name, and where it wants more bits it gets them. Everything is quantized before anything is
    replaced: after an error the model is as it was, and both are in memory for a moment.

    Args:
        model: The module that holds the layers, or what ``load`` returns; it is changed.
        format: As in a recipe, without activations: "w8a16", "w4a16-g64", "w3a16-g32-sym", or short "w8", "w4-g64".
        exclude: Patterns of paths that stay as they are, also where they are included; see ``recipes.patterns``.
        include: Patterns of the only paths that are taken; None for all.
        embeddings: Whether embeddings are taken, too.
        convolutions: Whether convolutions are taken.
        steps: "extremes", or "mse", which searches for the step of the least squared weight error: slower, better below
            8 bits.
        fallback: The format of layers whose width the groups of ``format`` do not divide; without it, such layers are
            an error.

    Returns:
        Bytes before and after, the relative error of each quantized weight, and why other layers stayed.

    Raises:
        RecipeError: On an unknown format or one with quantized activations, on a pattern that matches nothing, on
            groups that do not fit, and when there is nothing to quantize. It names the layer, as do the others.
        NumericsError: On NaN or infinite weights.
        AdapterError: On what is no module of MLX.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> import mlxquant as mq
        >>> class MyCustomModel(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden = nn.Linear(64, 256)
        ...         self.lm_head = nn.Linear(256, 64)
        ...     def __call__(self, x):
        ...         return self.lm_head(nn.relu(self.hidden(x)))
        >>> model = MyCustomModel()
        >>> report = mq.quantize_linears(model, "w8a16", exclude=["lm_head"])
        >>> report.before, report.after
        (132352, 83712)
        >>> [(layer.path, layer.format) for layer in report.layers]
        [('hidden', 'w8')]
        >>> model(mx.ones((2, 64))).shape
        (2, 64)
    """
    main, other = parse_format(format), None if fallback is None else parse_format(fallback)
    selection = Selection(
        module_of(model), as_list(exclude), None if include is None else as_list(include), embeddings, convolutions
    )

    def quantized(chosen: Sequence[Held]) -> list[QuantizedLayer]:
        fitting = zip(chosen, _fitting(chosen, main, other), strict=True)
        formats = [_at_least(one_format, selection.wanted(one.path, one.module)) for one, one_format in fitting]
        layers = [_quantized(one, one_format, steps) for one, one_format in zip(chosen, formats, strict=True)]
        _share_codes(chosen, layers)
        return layers

    return replace_layers(selection, quantized)


def replace_layers(selection: Selection, made: Callable[[Sequence[Held]], Sequence[nn.Module]]) -> SizeReport:
    """Put what is ``made`` of the selected layers, all of them together, in their places.

    Raises RecipeError on a pattern that matches nothing, and when nothing is selected.
    """
    model = selection.model
    found = find_held(model)
    places = places_of(found)
    if "" in places:
        raise RecipeError(
            "the model is itself one layer, which cannot be replaced in place; use W8A16Linear.from_linear, or wrap it"
        )
    require_matches("exclude", selection.exclude, places)
    require_matches("include", selection.include or [], places)
    reasons = {one.path: selection.reason_to_keep(one) for one in found}
    reasons |= _tied_to_kept(model, [one for one in found if reasons[one.path] is None])
    kept = tuple(
        KeptLayer(one.path, type(one.module).__name__, nbytes, reason)
        for one in found
        if (reason := reasons[one.path]) is not None and (nbytes := _matrix_bytes(one.module))
    )
    chosen = [one for one in found if reasons[one.path] is None]
    if not chosen:
        told = "; ".join(f"{layer.path}: {layer.reason}" for layer in kept[:3])
        raise RecipeError(
            f"nothing to quantize in {type(model).__name__}: {told or 'it has no nn.Linear, embedding or convolution'}"
        )
    before, weights = stored_bytes(model), weight_count(model)
    layers = made(chosen)
    sizes = tuple(_size(one, layer) for one, layer in zip(chosen, layers, strict=True))
    for one, layer in zip(chosen, layers, strict=True):
        for path in one.paths:
            set_module(model, path, layer)
    return SizeReport(sizes, kept, before, stored_bytes(model), weights)


def parse_format(text: str) -> WeightFormat:
    """A recipe's specification whose activations stay at 16 bits, such as "w4a16-g64", or a weight format, such as
    "w4-g64".

    Raises RecipeError on anything else.
    """
    if not isinstance(text, str):
        raise RecipeError(f"a format is text, such as 'w8a16' or 'w4a16-g64', found {text!r}")
    if re.match(r"w\d+(-|$)", text):
        return WeightFormat.parse(text)
    spec = parse_spec(text)
    if spec.activation is not None:
        raise RecipeError(
            f"format {text!r} quantizes activations to {spec.activation.bits} bits, which needs calibration data: "
            "use mq.calibrate and mq.quantize, or a format with a16"
        )
    return spec.weight


def find_held(model: nn.Module) -> list[Held]:
    """Every module once, in the order in which they were defined, with all paths to it, hidden ones last."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in reversed(model.named_modules()):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
    return [Held(module, tuple(sorted(paths[key], key=is_hidden)), kind_of(module)) for key, module in modules.items()]


def places_of(found: Iterable[Held]) -> list[str]:
    """Every path that a pattern can name: those of layers that can be quantized, or are."""
    return [path for one in found if one.kind is not None or is_packed(one.module) for path in one.paths]


def _matrix_bytes(module: nn.Module) -> int:
    """Bytes of the arrays with two axes or more that a module holds itself."""
    return sum(value.nbytes for value in module.values() if isinstance(value, mx.array) and value.ndim > 1)


def _tied_to_kept(model: nn.Module, chosen: list[Held]) -> dict[str, str]:
    """Those of the chosen layers whose very weight is also a parameter of something that is not chosen, and what that
    is.
    """
    ours = {f"{path}.weight" for one in chosen for path in one.paths}
    holders = {id(value): name for name, value in parameters(model).items() if name not in ours}
    tied = {one.path: holders.get(id(one.module.weight)) for one in chosen}
    return {
        path: f"shares its weight with {holder}, which stays as it is"
        for path, holder in tied.items()
        if holder is not None
    }


def _fitting(chosen: Sequence[Held], main: WeightFormat, fallback: WeightFormat | None) -> list[WeightFormat]:
    """The format of each layer; raises RecipeError that names the layers whose width neither fits."""
    formats, misfits = [], []
    for one in chosen:
        assert one.kind is not None
        width = one.kind.shape(one.module)[1]
        fits = next(
            (f for f in (main, fallback) if f is not None and not (isinstance(f.group, int) and width % f.group)), None
        )
        if fits is None:
            misfits.append(f"{one.path} ({width})")
        else:
            formats.append(fits)
    if misfits:
        shown = ", ".join(misfits[:5]) + (" …" if len(misfits) > 5 else "")
        raise RecipeError(
            f"groups of {main.group} do not divide the width of {len(misfits)} layers: {shown}; exclude them, "
            "or give them another format, such as fallback='w8a16'"
        )
    return formats


def _at_least(format: WeightFormat, answer: bool | Mapping[str, Any]) -> WeightFormat:
    """A format with no fewer bits than a model wants."""
    wanted = answer.get("bits") if isinstance(answer, Mapping) else None
    return replace(format, bits=max(format.bits, wanted or 0))


def _quantized(one: Held, format: WeightFormat, steps: str) -> QuantizedLayer:
    """What stands for a layer; errors name it."""
    try:
        assert one.kind is not None
        return one.kind.quantized(one.module, format, steps)
    except MlxQuantError as error:
        raise type(error)(f"layer {one.path}: {error}") from error


def _share_codes(chosen: Sequence[Held], layers: Sequence[QuantizedLayer]) -> None:
    """Give layers whose weights were one array, and whose formats are one, the same arrays again."""
    twins: dict[tuple[int, WeightFormat], QuantizedLayer] = {}
    for one, layer in zip(chosen, layers, strict=True):
        twin = twins.setdefault((id(one.module.weight), layer.format), layer)
        layer.share_integers(twin)


def layer_size(path: str, before: nn.Module, after: nn.Module) -> LayerSize:
    """What became of a layer that was replaced."""
    return _size(Held(before, (path,), kind_of(before)), after)


def kept_layers(model: nn.Module, reasons: Mapping[str, str]) -> tuple[KeptLayer, ...]:
    """Modules with matrices of their own that are not quantized, and why, where ``reasons`` do not say it by path: the
    recipe kept what it could have taken.
    """
    kept = []
    for one in find_held(model):
        if is_packed(one.module) or not (nbytes := _matrix_bytes(one.module)):
            continue
        reason = KEPT if one.kind else f"no quantized form of {type(one.module).__name__} here"
        kept.append(KeptLayer(one.path, type(one.module).__name__, nbytes, reasons.get(one.path, reason)))
    return tuple(kept)


def _size(one: Held, layer: nn.Module) -> LayerSize:
    weight = np.array(one.module.weight.astype(mx.float32)).reshape(-1)
    if isinstance(layer, QuantizedLayer):
        format, after, restored = str(layer.format), layer.nbytes, layer.dequantized()
    else:
        format, restored = type(layer).__name__, _weight_told_by(layer, one.module.weight.shape[1])
        after = stored_bytes(layer) - (layer.bias.nbytes if "bias" in layer else 0)
    norm = float(np.linalg.norm(weight))
    error = float(np.linalg.norm(weight - np.array(restored).reshape(-1))) / norm if norm else 0.0
    kind, shape, nbytes = type(one.module).__name__, one.module.weight.shape, one.module.weight.nbytes
    return LayerSize(one.path, kind, shape, format, nbytes, after, error)


def _weight_told_by(linear: nn.Module, width: int) -> mx.array:
    """The weight float32 [out,in] that anybody's linear layer multiplies by: what it answers to unit vectors."""
    return (linear(mx.eye(width)) - linear(mx.zeros((1, width)))).T.astype(mx.float32)
