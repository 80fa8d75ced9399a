"""A quantized module in one file: all its parameters, and which of its layers are quantized how.

The code of a model is not in the file. Build the model as it was before it was quantized, then load: the layers are
replaced and all parameters filled in, with the dtypes that they had. Nothing is changed before everything was found to
fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError, ArtifactError
from ..files import schema
from ..files.checked import read_tensors, understood, write_tensors
from ..grids.keeping_time import Time, keep_time
from ..grids.time import Clock
from .attention import QuantizedAttention, find_attentions, find_quantized_attentions
from .kinds import find_layers, rebuilt, refresh, structure
from .names import WEIGHT
from .own import QuantizedModule
from .packed import QuantizedLayer
from .sizes import is_hidden
from .tree import get_module, parameters, set_module

KIND = "quantized-module"
STILL = 0.0  # what the clock of a module shows whose tables have one entry
HEADER = schema.entries(
    {
        **dict.fromkeys(("layers", "layers_that_share"), schema.table_of(structure)),
        **dict.fromkeys(("same_layers", "same_arrays"), schema.table_of(schema.text)),
    },
    {"attentions": schema.table_of(QuantizedAttention.STRUCTURE)},
)


def save_module(model: nn.Module, path: str | Path) -> Path:
    """Write a module that ``quantize_linears`` or ``quantize_module`` quantized as one safetensors file; equal modules
    give equal bytes.

    An array or a layer that is used at several places is written once.

    Args:
        model: The module; its own code is not written.
        path: The file.

    Returns:
        The file.

    Raises:
        ArtifactError: When the module holds what the file cannot, such as dtypes that are not stored.
    """
    path = Path(path)
    for place, module in model.named_modules():
        if isinstance(module, QuantizedModule) and not isinstance(module, QuantizedLayer | QuantizedAttention):
            raise ArtifactError(
                f"{path}: {place} is a {type(module).__name__}, which this file cannot hold; save the model that"
                " mlxquant.quantize returned"
            )
    arrays: dict[str, mx.array] = {}
    same_arrays: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, value in sorted(parameters(model).items()):
        if (at := names.setdefault(id(value), name)) == name:
            arrays[name] = value
        else:
            same_arrays[name] = at
    facts: dict[str, dict[str, Any]] = {"layers": {}, "layers_that_share": {}}
    same_layers: dict[str, str] = {}
    places: dict[int, str] = {}
    for place, module in sorted(find_layers(model).items(), key=lambda found: (is_hidden(found[0]), found[0])):
        if (at := places.setdefault(id(module), place)) == place:
            kind = "layers" if f"{place}.{WEIGHT}" in arrays else "layers_that_share"
            facts[kind][place] = {"class": type(module).__name__, **module.facts}
        else:
            same_layers[place] = at
    if attentions := {place: module.facts for place, module in find_quantized_attentions(model).items()}:
        facts["attentions"] = attentions
    write_tensors(path, KIND, arrays, {**facts, "same_layers": same_layers, "same_arrays": same_arrays})
    return path


def load_module(model: nn.Module, path: str | Path, time: Time | None = None) -> nn.Module:
    """Make a freshly built model, in full precision, the one that ``save_module`` wrote.

    Args:
        model: The module, built as it was before it was quantized; it is changed.
        path: The file.
        time: Called with the arguments of a call of the model, returns its noise level in [0,1], as ``quantize_module``
            was given it; needed where layers have a table for each noise level.

    Returns:
        The model.

    Raises:
        ArtifactError: On a missing, damaged or foreign file, on another model, and on tables that want a ``time`` that
            is not given; then the model is as it was.
    """
    path = Path(path)
    arrays, header = read_tensors(path, KIND, schema=HEADER)
    with understood(path, "write it anew"):
        facts = header["layers"] | header["layers_that_share"]
        attentions = header.get("attentions", {})
        levels = max((some["table"][0] for some in facts.values() if some.get("table")), default=0)
        levels = max([levels, *(some["table"] for some in attentions.values())])
        clock = Clock(None if time is not None else STILL)
        layers = {place: rebuilt(some, clock if some.get("table") else None) for place, some in facts.items()}
        layers.update({place: layers[at] for place, at in header["same_layers"].items()})
        arrays.update({name: arrays[at] for name, at in header["same_arrays"].items()})
    if levels > 1 and time is None:
        raise ArtifactError(
            f"{path}: its layers have tables of {levels} noise levels; pass time=, which reads the level of a call from"
            " its arguments, as mlxquant.quantize_module was given it"
        )
    for place in attentions:
        if place not in find_attentions(model):
            raise ArtifactError(
                f"{path}: does not fit the model: its attention at {place} is quantized, and the model has none there"
                " that can be opened; build the model that was quantized"
            )
    opened = {place: QuantizedAttention.blank(some, clock) for place, some in attentions.items()}
    for place, layer in layers.items():
        _require_fit(path, model, place, layer)
    replaced: dict[str, nn.Module] = {**layers, **opened}
    _require_parameters(path, model, replaced, arrays)
    for place, module in replaced.items():
        set_module(model, place, module)
    model.load_weights(list(arrays.items()))
    refresh(model)
    if levels and time is not None:
        keep_time(model, clock, time)
    return model


def _require_fit(path: Path, model: nn.Module, place: str, layer: QuantizedLayer) -> None:
    """Raise ArtifactError unless the model holds at ``place`` what ``layer`` can stand for."""
    expected = layer.replaces
    wrong = (
        f"{path}: does not fit the model: at {place} it has a {type(layer).__name__} for a {expected.__name__} of shape"
        f" {layer.shape}"
    )
    try:
        module = get_module(model, place)
    except AdapterError as error:
        raise ArtifactError(f"{wrong}, the model has none ({error}); build the model that was quantized") from error
    if not isinstance(module, expected):
        raise ArtifactError(
            f"{wrong}, the model has a {type(module).__name__}; build the model anew, in full precision"
        )
    if (difference := layer.differences(module)) is not None:
        raise ArtifactError(f"{wrong}, {difference}; build the model that was quantized")


def _require_parameters(
    path: Path, model: nn.Module, layers: Mapping[str, nn.Module], arrays: Mapping[str, mx.array]
) -> None:
    """Raise ArtifactError unless ``arrays`` are those of the model with these layers in place, in names and shapes."""
    public = {name: value.shape for name, value in parameters(model).items()}
    expected = {name: shape for name, shape in public.items() if name.rpartition(".")[0] not in layers}
    for place, layer in layers.items():
        if f"{place}.{WEIGHT}" in public or isinstance(layer, QuantizedAttention):  # what is private has no parameters
            expected.update({f"{place}.{name}": value.shape for name, value in parameters(layer).items()})
    found = {name: value.shape for name, value in arrays.items()}
    if missing := sorted(set(expected) - set(found)):
        raise ArtifactError(f"{path}: does not fit the model: lacks {', '.join(missing[:3])} ({len(missing)} in all)")
    if extra := sorted(set(found) - set(expected)):
        raise ArtifactError(f"{path}: does not fit the model, which lacks {', '.join(extra[:3])} ({len(extra)} in all)")
    if name := next((name for name in sorted(found) if found[name] != expected[name]), None):
        raise ArtifactError(
            f"{path}: does not fit the model: {name} has shape {found[name]}, the model expects {expected[name]}"
        )
