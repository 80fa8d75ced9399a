"""What is known of some of mflux's transformers beyond what a recording shows: at which noise level a call is, and
which layers read the same tensor.

With the noise level static tables have an entry for each. With edges a transform is folded into what writes a tensor,
and costs nothing while the model runs. A transformer that is not here is quantized all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...grids.keeping_time import Time
from ...layers.opening import open_attention
from ...layers.tree import get_module
from ..edges import Edge, Fold

Modulation = tuple[Fold, ...]


@dataclass(frozen=True)
class Host:
    """What is known of a module: how to read the noise level in [0,1] from a call, None where nobody knows, its edges,
    and where the code stands that computes its attentions, which are the modules at the paths ``attentions``.
    """

    time: Time | None = None
    edges: tuple[Edge, ...] = ()
    attentions: tuple[str, ...] = ()
    code: str = ""

    def open(self, module: nn.Module) -> None:
        """Let the attentions of the module be found."""
        for path in self.attentions:
            open_attention(get_module(module, path), vars(import_module(f"mflux.{self.code}")))


def host_of(module: nn.Module) -> Host:
    """What is known of a module; an empty ``Host`` where that is nothing."""
    kind = type(module)
    known = HOSTS.get(f"{kind.__module__}.{kind.__name__}".removeprefix("mflux.models."))
    return Host() if known is None else known(module)


def _rows(path: str, width: int, shift: int, scale: int) -> Modulation:
    """The rows of a modulation that write ``shift`` and ``scale``, counted in runs of ``width``, for x ↦ norm(x) · (1 +
    scale) + shift.
    """
    return (
        Fold(path, shift * width, (shift + 1) * width),
        Fold(path, scale * width, (scale + 1) * width, plus_one=True),
    )


def _flux1(module: Any) -> Host:
    """FLUX.1: double blocks with a modulation a stream (shift, scale and gate of attention, then of the MLP), single
    blocks with one for both, whose last layer reads attention and MLP side by side.
    """
    edges = []
    for index in range(len(module.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        for norm, names, mlp in (("norm1", "to_{}", "ff"), ("norm1_context", "add_{}_proj", "ff_context")):
            edges += _stream(
                module,
                f"{block}.{norm}.linear",
                f"{block}.attn.{names}",
                f"{block}.{mlp}.linear1",
                f"{block}.{mlp}.linear2",
            )
        edges.append(
            _values(module, block, ("to_out.0", "to_add_out"), module.transformer_blocks[index].attn.num_heads)
        )
    for index in range(len(module.single_transformer_blocks)):
        block = f"single_transformer_blocks.{index}"
        width, wide = _width(module, f"{block}.norm.linear"), _out(module, f"{block}.proj_mlp")
        read = (*(f"{block}.attn.to_{which}" for which in "qkv"), f"{block}.proj_mlp")
        edges.append(Edge(read, _rows(f"{block}.norm.linear", width, 0, 1)))
        heads, last = module.single_transformer_blocks[index].attn.num_heads, (f"{block}.proj_out",)
        value, hidden = Fold(f"{block}.attn.to_v", 0, width), Fold(f"{block}.proj_mlp", 0, wide)
        edges.append(Edge(last, (value,), mixes=width // heads, columns=(0, width)))
        edges.append(Edge(last, after="gelu", reorders=(hidden,), columns=(width, width + wide)))
    edges.append(Edge(("proj_out",), _rows("norm_out.linear", _width(module, "norm_out.linear"), 1, 0)))
    lists = ("transformer_blocks", "single_transformer_blocks")
    attentions = tuple(f"{name}.{index}.attn" for name in lists for index in range(len(getattr(module, name))))
    return Host(_of_step, tuple(edges), attentions, "models.flux.model.flux_transformer.common.attention_utils")


def _qwen_image(module: Any) -> Host:
    """Qwen-Image: double blocks as FLUX.1's."""
    edges = []
    for index, one in enumerate(module.transformer_blocks):
        block = f"transformer_blocks.{index}"
        for stream, names in (("img", "to_{}"), ("txt", "add_{}_proj")):
            edges += _stream(
                module,
                f"{block}.{stream}_mod_linear",
                f"{block}.attn.{names}",
                f"{block}.{stream}_ff.mlp_in",
                f"{block}.{stream}_ff.mlp_out",
            )
        edges.append(_values(module, block, ("attn_to_out.0", "to_add_out"), one.attn.num_heads))
    return Host(_of_step, tuple(edges))


def _z_image(module: Any) -> Host:
    """Z-Image: norms with gains, which take in what is divided, and gated MLPs, w2(silu(w1 x) · w3 x)."""
    edges = []
    for name in ("noise_refiner", "context_refiner", "layers"):
        for index, one in enumerate(getattr(module, name)):
            block = f"{name}.{index}"
            width, wide = _width(module, f"{block}.feed_forward.w1"), _out(module, f"{block}.feed_forward.w1")
            read = tuple(f"{block}.attention.to_{which}" for which in "qkv")
            edges.append(Edge(read, (Fold(f"{block}.attention_norm1", 0, width),)))
            gates = (f"{block}.feed_forward.w1", f"{block}.feed_forward.w3")
            edges.append(Edge(gates, (Fold(f"{block}.ffn_norm1", 0, width),)))
            edges.append(Edge((f"{block}.feed_forward.w2",), (Fold(f"{block}.feed_forward.w3", 0, wide),)))
            value = Fold(f"{block}.attention.to_v", 0, width)
            mixes = width // one.attention.n_heads
            edges.append(Edge((f"{block}.attention.to_out.0",), (value,), mixes=mixes))
    return Host(_of_time_left, tuple(edges))


def _flux2(module: Any) -> Host:
    """FLUX.2: one modulation for all blocks, which can take in nothing for one of them; gated MLPs whose halves come
    from one layer; single blocks in which attention and MLP have one layer before them and one behind.
    """
    edges = []
    for index, one in enumerate(module.transformer_blocks):
        block = f"transformer_blocks.{index}"
        edges.append(_values(module, block, ("to_out", "to_add_out"), one.attn.heads))
        for mlp in ("ff", "ff_context"):
            wide = _width(module, f"{block}.{mlp}.linear_out")
            edges.append(Edge((f"{block}.{mlp}.linear_out",), (Fold(f"{block}.{mlp}.linear_in", wide, 2 * wide),)))
    for index, one in enumerate(module.single_transformer_blocks):
        attention = f"single_transformer_blocks.{index}.attn"
        width, wide = one.attn.inner_dim, one.attn.mlp_hidden_dim
        value = Fold(f"{attention}.to_qkv_mlp_proj", 2 * width, 3 * width)
        gated = Fold(f"{attention}.to_qkv_mlp_proj", 3 * width + wide, 3 * width + 2 * wide)
        mixes, last = one.attn.dim_head, (f"{attention}.to_out",)
        edges.append(Edge(last, (value,), mixes=mixes, columns=(0, width)))
        edges.append(Edge(last, (gated,), columns=(width, width + wide)))
    return Host(_of_thousands, tuple(edges))


def _stream(module: Any, modulation: str, names: str, first: str, second: str) -> list[Edge]:
    """One stream of a double block: ``modulation`` writes shift, scale and gate of the attention, whose layers go by
    ``names``, then of the MLP with a GELU between its ``first`` and its ``second`` layer.
    """
    width = _width(module, first)
    return [
        Edge(tuple(names.format(which) for which in "qkv"), _rows(modulation, width, 0, 1)),
        Edge((first,), _rows(modulation, width, 3, 4)),
        Edge((second,), after="gelu", reorders=(Fold(first, 0, _out(module, first)),)),
    ]


def _values(module: Any, block: str, outputs: tuple[str, str], heads: int) -> Edge:
    """What both streams of a double block read of one attention: the values of both, mixed by heads."""
    width = _out(module, f"{block}.attn.to_v")
    values = tuple(Fold(f"{block}.attn.{name}", 0, width) for name in ("to_v", "add_v_proj"))
    return Edge(tuple(f"{block}.attn.{name}" for name in outputs), values, mixes=width // heads)


def _of_step(t: int, config: Any, *args: Any, **kwargs: Any) -> mx.array:
    """The noise level of the step whose number a transformer is told."""
    return config.scheduler.sigmas[t]


def _of_time_left(*args: Any, timestep: Any, sigmas: mx.array, **kwargs: Any) -> Any:
    """Of Z-Image, which is told the number of a step, or 1 − the noise level."""
    return sigmas[timestep] if isinstance(timestep, int) else 1 - timestep


def _of_thousands(*args: Any, timestep: Any, **kwargs: Any) -> mx.array:
    """Of FLUX.2 and ERNIE-Image, which are told it in thousands; FLUX.2 takes what is at most 1 as it is."""
    time = mx.array(timestep).astype(mx.float32)
    return mx.where(time.max() <= 1, time, time / 1000)


def _as_it_is(*args: Any, timestep: Any, **kwargs: Any) -> Any:
    """Of FLUX.3, which is told the noise level."""
    return timestep


def _width(module: Any, path: str) -> int:
    """Input channels of the Linear at a path."""
    return int(_weight(module, path).shape[1])


def _out(module: Any, path: str) -> int:
    """Output channels of the Linear at a path."""
    return int(_weight(module, path).shape[0])


def _weight(module: Any, path: str) -> mx.array:
    weight: mx.array = get_module(module, path).weight
    return weight


HOSTS: dict[str, Callable[[Any], Host]] = {
    "ernie_image.model.ernie_transformer.transformer.ErnieTransformer": lambda module: Host(_of_thousands),
    "flux.model.flux_transformer.transformer.Transformer": _flux1,
    "flux2.model.flux2_transformer.transformer.Flux2Transformer": _flux2,
    "flux3.model.flux3_transformer.flux3_transformer.Flux3Transformer": lambda module: Host(_as_it_is),
    "qwen.model.qwen_transformer.qwen_transformer.QwenTransformer": _qwen_image,
    "z_image.model.z_image_transformer.transformer.ZImageTransformer": _z_image,
}
