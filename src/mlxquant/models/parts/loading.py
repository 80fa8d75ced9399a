"""How a part comes out of a source: its config held against a schema, its tensors against what the config asks for.

A module has the parameter names of diffusers or transformers, so a tensor goes where its name says. Kernels of
convolutions are the only tensors with four axes; they go from torch's layout to MLX's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import ArtifactError
from ...files.schema import MismatchError, Schema
from ..checkpoints.source import Source, Tensors

Shapes = Mapping[str, tuple[int, ...]]


def read_config(source: Source, component: str, classes: Sequence[str], schema: Schema) -> dict[str, Any]:
    """The config of a component that is of one of some classes.

    Args:
        source: Where the model is.
        component: Such as "text_encoder".
        classes: What its ``_class_name`` (diffusers) or the first of its ``architectures`` (transformers) may be.
        schema: What its other entries must be.

    Returns:
        The config; its ``_class_name`` is set.

    Raises:
        ArtifactError: It is missing, of another class, or has an entry that nothing can be built from.
    """
    config = source.config(component)
    where = f"{source.place}: {component}/config.json"
    named = config.get("architectures")
    kind = config.get("_class_name", named[0] if isinstance(named, list) and named else None)
    if kind not in classes:
        found = "names no class" if kind is None else f"is of {str(kind)[:100]!r}"
        raise ArtifactError(f"{where} {found}, expected {' or '.join(classes)}; another model's, or a damaged one")
    try:
        schema(config, "")
    except MismatchError as error:
        raise ArtifactError(f"{where}: {error}; another model's, or a damaged one: download it again") from error
    return {**config, "_class_name": kind}


def in_place(source: Source, component: str) -> str:
    """What an error calls the weights of a component."""
    return f"{source.place}: the weights of {component}"


def fitting(arrays: Mapping[str, mx.array], shapes: Shapes, where: str, unused: Sequence[str] = ()) -> Tensors:
    """The tensors that a config asks for, out of those of a file; nothing is read.

    Args:
        arrays: Name to tensor, in torch's layouts.
        shapes: Name to shape of each that is needed, in torch's layouts.
        where: What an error calls them, see ``in_place``.
        unused: Patterns of names that may be there besides.

    Raises:
        ArtifactError: One is missing, has another shape, is not of floats, or has no place in a model of this config.
    """
    if missing := sorted(set(shapes) - set(arrays)):
        raise ArtifactError(
            f"{where} lack {len(missing)} of {len(shapes)} tensors, such as {missing[0]}; the file is another model's,"
            " or a part of one: download it again"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ArtifactError(
                f"{where}: {name} has shape {arrays[name].shape}, and {shape} by config.json; one of the two files is"
                " another model's"
            )
        if not mx.issubdtype(arrays[name].dtype, mx.floating):
            raise ArtifactError(
                f"{where}: {name} is {str(arrays[name].dtype).removeprefix('mlx.core.')}, so the file is quantized"
                " already; expected float16, bfloat16 or float32: get the full-precision file"
            )
    others = (name for name in arrays if name not in shapes and not any(fnmatchcase(name, p) for p in unused))
    if other := next(others, None):
        raise ArtifactError(
            f"{where} have {other}, which a model of this config.json has not; one of the two files is another model's"
        )
    return {name: arrays[name] for name in shapes}


def fill(
    module: nn.Module, arrays: Mapping[str, mx.array], dtype: mx.Dtype, where: str, unused: Sequence[str] = ()
) -> None:
    """Give a module all of its parameters, as ``dtype``, and freeze it.

    Args:
        module: Its parameters have the names of the tensors.
        arrays: Name to tensor, in torch's layouts: kernels are [out, in, height, width]. They are read from the disk
            when the module first computes.
        dtype: What they become.
        where: What an error calls them, see ``in_place``.
        unused: Patterns of names that may be there besides.

    Raises:
        ArtifactError: As ``fitting``.
    """
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    shapes = {name: _of_torch(value.shape) for name, value in parameters.items()}
    found = fitting(arrays, shapes, where, unused)
    turned = {name: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for name, value in found.items()}
    module.load_weights([(name, value.astype(dtype)) for name, value in turned.items()])
    module.freeze()
    module.eval()


def _of_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of MLX's as torch has it: a kernel's channels come before its places."""
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape
