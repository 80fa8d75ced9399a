"""A checkpoint that DiffusionKit's own pipeline reads: ``sd3_medium.safetensors`` with a quantized transformer's
values.

DiffusionKit (0.5.1) makes packed layers only for the two 4-bit checkpoints whose names are written into it, none of
them SD3-Medium's size. So the weights are written as float16 numbers: what the quantized layers multiply with,
rotations, divisors and low-rank branches folded in. The picture is the quantized model's with unquantized activations,
to float16's rounding; the file is no smaller. A row of weights below 6e-5 has fewer digits in float16, in which
DiffusionKit would compute it anyhow: that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ExportError
from ..files.hub import lazy_tensors
from ..layers.attention import QuantizedAttention
from ..layers.linear import QuantizedLinear
from ..layers.product import QuantizedProduct
from ..layers.tree import parameters
from ..models.diffusionkit.checkpoint import MMDIT_PREFIX
from ..models.diffusionkit.files import CHECKPOINT, Files
from ..numerics.arrays import Array
from ..numerics.hadamard import regular_hadamard
from .plain import PlainModule, part_obstacles, refusal

VAE_PREFIX = "first_stage_model."
MODELS = ("sd3-medium", "sd3-medium-diffusionkit")
ORDINARY = 2.0**-10  # twice what float16 changes of a number for which it has all its digits
RENAMED = (  # from DiffusionKit's names of the transformer's parameters to the checkpoint's
    ("multimodal_transformer_blocks.", "joint_blocks."),
    ("image_transformer_block.", "x_block."),
    ("text_transformer_block.", "context_block."),
    ("x_pos_embedder.pos_embed.weight", "pos_embed"),
    ("attn.o_proj.", "attn.proj."),
    (".layers.", "."),
)
FUSED = ("q_proj", "k_proj", "v_proj")  # rows of attn.qkv; DiffusionKit has no bias of k


def write_diffusionkit(folder: Path, plain: PlainModule, place: str) -> None:
    """Write the transformer, and the VAE of the checkpoint at ``place``, a folder, a hub id or a single file, which
    DiffusionKit expects in the same file.
    """
    path = Path(place) if Path(place).is_file() else Files(place).path(CHECKPOINT)
    vae = {name: value for name, value in lazy_tensors(path).items() if name.startswith(VAE_PREFIX)}
    if not vae:
        raise ExportError(f"{path} has no autoencoder ({VAE_PREFIX}*), which DiffusionKit expects in the file")
    mx.save_safetensors(str(folder / CHECKPOINT), {**vae, **checkpoint_arrays(plain.arrays)})


def float_module(module: nn.Module, target: str, drop_activations: bool = False) -> PlainModule:
    """All of a module in float16, quantized layers by what they multiply with; raises ExportError where activations are
    quantized and are not to be dropped, or a weight is beyond float16.
    """
    arrays, found, rounding, rows = parameters(module), {}, list[float](), list[Array]()
    for path, part in sorted(module.named_modules()):
        if here := [o for o in part_obstacles(part) if o.activations and not drop_activations]:
            found[path] = here
        if isinstance(part, QuantizedProduct | QuantizedAttention):
            for name in [name for name in arrays if name.startswith(f"{path}.") and name != f"{path}.bias"]:
                del arrays[name]
        if isinstance(part, QuantizedProduct) and not found:
            exact = effective_weight(part)
            arrays[f"{path}.weight"] = exact.astype(mx.float16)
            error = mx.abs(arrays[f"{path}.weight"].astype(mx.float32) - exact).max() / mx.abs(exact).max()
            rounding.append(float(np.array(error)))
            rows.append(row_changes(exact, arrays[f"{path}.weight"]))
    if found:
        raise ExportError(refusal(found, target))
    arrays = {name: value.astype(mx.float16) for name, value in arrays.items()}
    if broken := [name for name, value in arrays.items() if not mx.isfinite(value).all().item()]:
        raise ExportError(
            f"{broken[0]}: holds values that float16 cannot, in which DiffusionKit keeps weights; leave it unquantized"
        )
    biases = [name for name in arrays if name.endswith("k_proj.bias")]
    left = [f"{len(biases)} biases of keys written, which DiffusionKit leaves out"] if biases else []
    if not rounding:
        return PlainModule(arrays, notes=left)
    note = (
        f"{len(rounding)} quantized layers written as float16 numbers: DiffusionKit has no packed SD3-Medium, so the"
        " file is no smaller"
    )
    notes = [*left, f"{note}; weights are within {max(rounding):.1e} of a layer's largest"]
    changes = np.concatenate(rows)
    if (coarse := changes > ORDINARY).any():
        notes.append(
            f"{coarse.sum()} rows of weights are so small that float16 has fewer digits for them: up to"
            f" {changes.max():.1e} of a row's largest is lost"
        )
    return PlainModule(arrays, notes=notes)


def row_changes(before: mx.array, after: mx.array) -> Array:
    """By how much a weight [out, in] changes at most in each row, as a share of the row's largest [out]."""
    exact, found = (np.array(value.astype(mx.float32)).reshape(len(value), -1) for value in (before, after))
    largest = np.abs(exact).max(1)
    changes: Array = np.abs(found - exact).max(1) / np.where(largest > 0, largest, 1)
    return changes


def effective_weight(layer: QuantizedProduct) -> mx.array:
    """What a layer multiplies its input with, activations aside: float32 in the shape of its weight.

    The layer computes ``T(x) (W + up down)^T`` with T dividing and rotating, so this is ``(W + up down) R^T
    diag(1/divisor)``.
    """
    if not isinstance(layer, QuantizedLinear):
        return mx.array(layer.effective()).reshape(layer.shape)
    weight = layer.dequantized()
    if (branch := layer.branch) is not None:
        weight = weight + mx.array(branch.up.astype(np.float32)) @ mx.array(branch.down.astype(np.float32))
    if layer.rotation > 1:
        blocks = weight.reshape(weight.shape[0], -1, layer.rotation)
        weight = (blocks @ mx.array(regular_hadamard(layer.rotation)).T).reshape(weight.shape)
    return weight if layer.divisor is None else weight / layer.divisor


def checkpoint_arrays(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The transformer's parameters under DiffusionKit's names to those of Stability's checkpoint: what its loader
    undoes.
    """
    found: dict[str, mx.array] = {}
    for name, value in arrays.items():
        part, _, leaf = name.rpartition(".")
        if part.endswith(FUSED):
            owner = part.rpartition(".")[0]
            if part.endswith(FUSED[0]):
                parts = [arrays.get(f"{owner}.{one}.{leaf}") for one in FUSED]
                found[f"{owner}.qkv.{leaf}"] = mx.concatenate(
                    [mx.zeros_like(value) if one is None else one for one in parts]
                )
        elif name == "x_embedder.proj.weight":
            found[name] = value.transpose(0, 3, 1, 2)  # the checkpoint has channels before rows and columns
        else:
            found[name] = value[None] if "pos_embed." in name else value
    return {MMDIT_PREFIX + checkpoint_name(name): value for name, value in found.items()}


def checkpoint_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name
