"""What a pipeline of mflux is made of: modules with a folder each, and what of them mflux leaves unquantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import mlx.nn as nn

from ...errors import AdapterError
from ...layers.tree import parameters
from .names import from_mflux

Purpose = Literal["transformer", "text", "decoder"]
SAVER = "models.common.weights.saving.model_saver.ModelSaver"
SPINE = 0.9  # of a module's parameters that one inside of it holds, for calls of that to stand for calls of the module
COMPONENT = "models.common.weights.loading.weight_definition.ComponentDefinition"


@dataclass(frozen=True)
class Component:
    """A module of a pipeline.

    Attributes:
        name: As mflux calls it, such as "t5_text_encoder".
        folder: Where it is in a saved model.
        module: The module.
        purpose: What for: the "transformer" predicts, "text" is read by what is no transformer, the "decoder" makes
            pictures of latents.
        takes: Asked with the path of a layer in the module and the layer: whether mflux reads it quantized.
    """

    name: str
    folder: str
    module: nn.Module
    purpose: Purpose
    takes: Callable[[str, nn.Module], bool]


def components_of(pipeline: Any) -> tuple[Component, ...]:
    """The components of a pipeline of mflux, in the order in which it saves them.

    Which they are, mflux says when it saves one, and nowhere else for all of its pipelines. So this asks a pipeline to
    save itself, and takes notes in the place of the one who would write.

    Raises:
        AdapterError: It does not save itself so.
    """
    definition = _definition(pipeline)
    listed = definition.get_components()
    folders = from_mflux(COMPONENT).save_subdirs(listed)
    takes = _predicate(definition.quantization_predicate)
    found = []
    for one in listed:
        module = getattr(pipeline, one.model_attr or one.name, None)
        if isinstance(module, nn.Module):
            found.append(Component(one.name, folders[one.name], module, _purpose(one.name), takes))
    return tuple(found)


def spine(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and, inside of it, what holds most of its parameters, and so on: of those a pipeline calls one. Some
    call a method of a text encoder that calls the rest.
    """
    yield path, module
    inside = [(name, one) for name, one in module.children().items() if isinstance(one, nn.Module)]
    every = _numbers(module)
    for name, one in inside:
        if _numbers(one) >= SPINE * every:
            yield from spine(one, f"{path}.{name}" if path else name)


@contextmanager
def in_place_of(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a static method of a class of mflux is another."""
    before = owner.__dict__[name]
    setattr(owner, name, staticmethod(function))
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Definition(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a saving before it begins, and says what would have been saved."""


def _definition(pipeline: Any) -> Any:
    """How a pipeline is made of components, as mflux's own saver is told."""
    saver = from_mflux(SAVER)

    def save_model(model: Any, bits: Any, base_path: Any, weight_definition: Any, **options: Any) -> None:
        raise _Definition(weight_definition)

    try:
        with in_place_of(saver, "save_model", save_model):
            pipeline.save_model("nothing is written here")
    except _Definition as said:
        return said.args[0]
    raise AdapterError(f"{type(pipeline).__name__} of this mflux does not say what it saves; use mflux 0.24")


def _predicate(asked: Callable[..., Any]) -> Callable[[str, nn.Module], bool]:
    """A definition's predicate as mflux asks it about what is stored. Some want to know the bits, too, and want other
    bits for some layers; what is stored goes before that.
    """
    more = (4,) if len(signature(asked).parameters) > 2 else ()

    def takes(path: str, layer: nn.Module) -> bool:
        return hasattr(layer, "to_quantized") and bool(asked(path, layer, *more))

    return takes


def _purpose(name: str) -> Purpose:
    if name.endswith("transformer"):
        return "transformer"
    return "decoder" if name == "vae" else "text"


def _numbers(module: nn.Module) -> int:
    return sum(value.size for value in parameters(module).values())
