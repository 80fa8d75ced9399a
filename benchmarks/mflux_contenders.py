"""A transformer as mflux runs it once it is quantized: by mflux's own ``-q``, or from a folder that a recipe wrote.

Either way mflux's own loader reads the folder, layer by layer, and its own code quantizes for ``-q``. Then the weights
that it will multiply by are put back into plain layers, in float32: products with packed weights are slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mflux.models.common.weights.loading.weight_applier import WeightApplier
from mflux.models.common.weights.loading.weight_loader import WeightLoader

import mlxquant as mq
from mlxquant.commandline.console import progress
from mlxquant.exporters.mflux import COMPONENT, write_mflux
from mlxquant.exporters.plain import prepared
from mlxquant.layers.tree import parameters
from mlxquant.models.mflux.families import host_of
from mlxquant.recipes.grammar import parse_recipe, with_bfloat16_scales
from mlxquant.recipes.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A transformer as mflux loads it.

    Attributes:
        module: With float32 weights in plain layers.
        nbytes: What mflux holds of it, all floating tensors in bfloat16.
        layers: Bits of each quantized layer, by path.
    """

    module: nn.Module
    nbytes: int
    layers: dict[str, int]


def write(module: nn.Module, folder: Path) -> None:
    """A transformer's folder as mflux has it, floating tensors in bfloat16."""
    write_mflux(folder, prepared(module, "mflux", False, "bfloat16"), COMPONENT)


def load(folder: Path, blank: nn.Module, definition: Any, bits: int | None = None) -> Loaded:
    """What mflux makes of a folder.

    Args:
        folder: As ``write`` leaves it.
        blank: A transformer of the same shape, whose weights are replaced.
        definition: mflux's definition of the model's components.
        bits: What its ``-q`` is told; None for nothing.
    """
    (component,) = [one for one in definition.get_components() if one.name == COMPONENT]
    weights = WeightLoader.load_single_local(component, folder)
    WeightApplier.apply_and_quantize_single(weights, blank, component, bits, definition.quantization_predicate)
    mx.eval(blank.parameters())
    bits_of = {path: layer.bits for path, layer in quantized(blank)}
    nbytes = sum(value.nbytes for value in parameters(blank).values())
    return Loaded(unpacked(blank), nbytes, bits_of)


def quantized(module: nn.Module) -> Iterator[tuple[str, nn.QuantizedLinear]]:
    """Its quantized layers by path."""
    return ((path, one) for path, one in module.named_modules() if isinstance(one, nn.QuantizedLinear))


def unpacked(module: nn.Module) -> nn.Module:
    """The same module with plain layers that hold what its quantized ones stand for, all of it float32."""
    module.set_dtype(mx.float32)
    plain = []
    for path, layer in quantized(module):
        one = nn.Linear(1, 1, bias="bias" in layer)
        one.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        if "bias" in layer:
            one.bias = layer.bias
        plain.append((path, one))
    for path, one in plain:
        place(module, path, one)
    mx.eval(module.parameters())
    return module


def place(module: Any, path: str, layer: nn.Module) -> None:
    """Put a layer where a path says."""
    *way, name = path.split(".")
    for part in way:
        module = module[int(part)] if part.isdigit() else module[part]
    if isinstance(module, list):
        module[int(name)] = layer
    else:
        module[name] = layer


def recipe_of(name: str) -> Recipe:
    """A recipe by its name, with overrides behind commas, its scales in bfloat16 as exported folders have them."""
    main, *overrides = name.split(",")
    return with_bfloat16_scales(parse_recipe(main, overrides))


@contextmanager
def quantized_folder(module: nn.Module, seen: mq.Recording, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Quantize a recorded transformer in place; inside, the folder that it makes, and what was done."""
    host = host_of(module)
    report = mq.quantize_module(module, seen, recipe_of(name), time=host.time, edges=host.edges, progress=progress)
    with TemporaryDirectory() as folder:
        write(module, Path(folder))
        yield Path(folder), {"blocks": list(report.blocks), "whole": report.whole}
