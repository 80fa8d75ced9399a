"""A folder that both read: any MLX program its plain layers, and ``mlxquant.load`` everything, with the same outputs
bit for bit.

``model.safetensors`` holds what an ordinary module has under its own names, quantized layers as ``nn.quantize`` makes
them; config.json says which bits and group size each has. ``mlxquant.safetensors``, beside it, holds what only our
layers know: activation scales, and whole layers that no plain one can stand for (rotated, divided, with a low-rank
branch, of 7 bits, or of a width that MLX has no group for).
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..api.model import KIND, QuantizedModel
from ..files import checked
from ..files.checked import file_digest, write_json, write_tensors
from ..files.parameters import compact
from ..layers.attention import find_quantized_attentions
from ..layers.kinds import find_layers, layer_facts
from ..layers.names import FOR_INPUT
from ..layers.plain import plain_bits, plain_layer
from ..layers.product import QuantizedProduct
from ..layers.sizes import numbers_in
from ..layers.tree import parameters
from ..sweep.store import module_facts
from .plain import PlainModule, placed

WEIGHTS, SIDECAR = "model.safetensors", "mlxquant.safetensors"


def split_module(model: QuantizedModel, drop_activations: bool) -> tuple[PlainModule, dict[str, mx.array]]:
    """What is plain, and the sidecar's arrays."""
    module = model.adapter.module
    layers, attentions = find_layers(module), find_quantized_attentions(module)
    reasons = {path: own_reasons(layer) for path, layer in layers.items()}
    own = [path for path in layers if reasons[path]]
    plain = {path: plain_layer(layer) for path, layer in layers.items() if not reasons[path]}
    main: dict[str, mx.array] = {}
    sidecar: dict[str, mx.array] = {}
    for name, value in parameters(module).items():
        path, _, leaf = name.rpartition(".")
        if path in layers or path in attentions:
            if leaf in FOR_INPUT:
                sidecar |= {} if drop_activations else {name: value}
            elif path in own:
                sidecar[name] = value
        else:
            main[name] = compact(value)
    for path, layer in plain.items():
        main |= placed(path, layer)
    why = Counter(" and ".join(reasons[path]) for path in own)
    notes = [f"{count} layers in {SIDECAR}, which only mlxquant runs, for {what}" for what, count in why.items()]
    unquantized = [path for path, part in module.named_modules() if hasattr(part, "to_quantized")]
    weights = numbers_in(sidecar.items(), {path: prod(layers[path].shape) for path in own})
    beside = (sum(value.nbytes for value in sidecar.values()), weights)
    return PlainModule(
        main, {path: layer.setting for path, layer in plain.items()}, sorted(unquantized), notes, beside
    ), sidecar


def own_reasons(layer: QuantizedProduct) -> list[str]:
    """Why a layer has to stay one of ours; empty where a plain one stands for it, activation scales aside."""
    bits = [] if plain_bits(layer.format) == layer.format.bits else [f"{layer.format.bits} bits"]
    return [o.what for o in layer.obstacles() if not o.activations] + bits


def write_mlx(folder: Path, model: QuantizedModel, drop_activations: bool) -> PlainModule:
    """Write a model into an empty folder."""
    plain, sidecar = split_module(model, drop_activations)
    files = {WEIGHTS: plain.arrays, **({SIDECAR: sidecar} if sidecar else {})}
    for name, arrays in files.items():
        write_tensors(folder / name, "weights", arrays, {"model": model.name})
    setting = {**(plain.usual or {}), **plain.layers, **dict.fromkeys(plain.unquantized, False)}
    description = model.adapter.describe()
    config = checked.canonical(
        {"model": model.name, **description, **({"quantization": setting} if plain.layers else {})}
    )
    (folder / "config.json").write_text(config, encoding="utf-8")
    layers = {path: structure(facts, drop_activations) for path, facts in layer_facts(model.layers).items()}
    facts = {
        **model.facts,
        "model": {"name": model.name, **description, "place": model.adapter.save_beside(folder)},
        "layers": layers,
        "plain": list(plain.layers),
        "attentions": {} if drop_activations else module_facts(find_quantized_attentions(model.adapter.module)),
        "files": {name: file_digest(folder / name) for name in files},
        **checked.versions(),
    }
    write_json(folder / "model.json", KIND, facts)
    return plain


def structure(facts: dict[str, Any], drop_activations: bool) -> dict[str, Any]:
    """A layer's facts, perhaps without activation scales."""
    if not drop_activations:
        return facts
    kept = {name: value for name, value in facts.items() if name != "network"}
    without = {"table": None, "log": False, "token": False}
    if "class" in facts:  # what there is nothing of, other kinds than Linears do not tell
        return {name: value for name, value in kept.items() if name not in without}
    return kept | without
