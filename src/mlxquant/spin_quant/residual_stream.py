"""Where the residual stream of a language model is written, normed and read, so that it can be rotated without knowing
the model.

Each description is plain paths into the module tree. A family is described only where the equations are known: a model
with the same names and other equations (norms behind the layers, scaled embeddings) would be silently wrong, so every
other model type is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..errors import AdapterError
from ..layers.tree import get_module
from ..models.gpt.network import GPT, MODEL_TYPE
from .plain_layers import plain


@dataclass(frozen=True)
class Values:
    """The values of an attention layer: from row ``first`` on the ``writer`` writes ``heads`` of them, ``size`` rows
    each; the ``reader`` has ``heads * repeats`` blocks of ``size`` columns, ``repeats`` neighbours of which read the
    same values.
    """

    writer: str
    reader: str
    heads: int
    size: int
    first: int
    repeats: int


@dataclass(frozen=True)
class ResidualStream:
    """Paths into a model's module tree.

    Attributes:
        width: Channels of the stream.
        centred: Whether norms subtract the mean over channels.
        embeddings: What writes the stream first.
        tokens: The embedding of tokens among them.
        norms: Every norm but the last, with the linears that read it.
        writers: Linears that add to the stream.
        values: Of each attention layer.
        inner: Linears whose input is the MLP's hidden state.
        final: The last norm.
        output: The linear to the vocabulary, None where that is an embedding.
        queries: For each layer the module that queries pass last before their product with keys, as [B,heads,T,size];
            empty where the model has none.
        keys: Likewise of keys; in some families the same module.
        held: For each layer one that values pass.
    """

    width: int
    centred: bool
    embeddings: tuple[str, ...]
    tokens: str
    norms: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[Values, ...]
    inner: tuple[str, ...]
    final: str
    output: str | None
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    @property
    def readers(self) -> dict[str, str]:
        """The linears of the blocks that read the stream, with the norm that they read it through."""
        return {reader: norm for norm, readers in self.norms.items() for reader in readers}

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears of the blocks in the order in which they run, those that read the same input together."""
        return tuple(
            group
            for readers, writer in zip(self.norms.values(), self.writers, strict=True)
            for group in (readers, (writer,))
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """The same, one by one."""
        return tuple(path for group in self.groups for path in group)

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer whose weight a rotation changes."""
        return (*self.embeddings, *self.linears, *([self.output] if self.output else []))


def residual_stream(model: nn.Module) -> ResidualStream:
    """The description of a model; raises AdapterError for a family that is not described, or with layers that are not
    plain, nor rounded weights that can be.
    """
    kind = MODEL_TYPE if isinstance(model, GPT) else getattr(model, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise AdapterError(f"the residual stream of a {kind!r} is not described; known families: {', '.join(FAMILIES)}")
    stream = FAMILIES[kind](model)
    for path in stream.layers:
        layer = get_module(model, path)
        found = plain(layer)
        if found is None or not (
            found is layer or isinstance(model, GPT)
        ):  # only a GPT of ours learns through rounding
            raise AdapterError(
                f"{path} is a {type(layer).__name__}; rotations need the full-precision layer, so rotate first"
            )
    if type(get_module(model, stream.final)) not in (nn.LayerNorm, nn.RMSNorm):
        raise AdapterError(
            f"{stream.final} is a {type(get_module(model, stream.final)).__name__}; the model is rotated already"
        )
    return stream


def _gpt(model: Any) -> ResidualStream:
    """GPT-2: ours, whose attention has seams, and mlx-lm's, which has none."""
    config = model.config if isinstance(model, GPT) else model.args
    width, heads = config.n_embd, config.n_head
    blocks = [f"model.h.{i}" for i in range(config.n_layer)]
    norms: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        norms |= {f"{block}.ln_1": (f"{block}.attn.c_attn",), f"{block}.ln_2": (f"{block}.mlp.c_fc",)}

    def seams(name: str) -> tuple[str, ...]:
        return tuple(f"{block}.attn.{name}" for block in blocks) if isinstance(model, GPT) else ()

    return ResidualStream(
        width=width,
        centred=True,
        embeddings=("model.wte", "model.wpe"),
        tokens="model.wte",
        norms=norms,
        writers=tuple(f"{block}.{half}.c_proj" for block in blocks for half in ("attn", "mlp")),
        values=tuple(
            Values(f"{block}.attn.c_attn", f"{block}.attn.c_proj", heads, width // heads, 2 * width, repeats=1)
            for block in blocks
        ),
        inner=tuple(f"{block}.mlp.c_proj" for block in blocks),
        final="model.ln_f",
        output=None,
        queries=seams("qk_mult_q_input"),
        keys=seams("qk_mult_k_input"),
        held=seams("pv_mult_v_input"),
    )


def _llama(model: Any) -> ResidualStream:
    """Llama and those that only differ in biases, norms of queries and keys, or windows of attention."""
    args = model.args
    heads = args.num_key_value_heads
    blocks = [f"model.layers.{i}" for i in range(args.num_hidden_layers)]
    norms: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        norms[f"{block}.input_layernorm"] = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
        norms[f"{block}.post_attention_layernorm"] = tuple(f"{block}.mlp.{name}_proj" for name in ("gate", "up"))
    size = get_module(model, f"{blocks[0]}.self_attn.v_proj").weight.shape[0] // heads
    ropes = tuple(f"{block}.self_attn.rope" for block in blocks)
    return ResidualStream(
        width=args.hidden_size,
        centred=False,
        embeddings=("model.embed_tokens",),
        tokens="model.embed_tokens",
        norms=norms,
        writers=tuple(f"{block}.{half}" for block in blocks for half in ("self_attn.o_proj", "mlp.down_proj")),
        values=tuple(
            Values(
                f"{block}.self_attn.v_proj",
                f"{block}.self_attn.o_proj",
                heads,
                size,
                0,
                args.num_attention_heads // heads,
            )
            for block in blocks
        ),
        inner=tuple(f"{block}.mlp.down_proj" for block in blocks),
        final="model.norm",
        output=None if args.tie_word_embeddings else "lm_head",
        queries=ropes,
        keys=ropes,
        held=tuple(f"{block}.self_attn.v_proj" for block in blocks),
    )


FAMILIES: dict[str, Callable[[Any], ResidualStream]] = {
    MODEL_TYPE: _gpt,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}


def untie(model: Any) -> bool:
    """Give a model an output layer of its own where its family has one, with the embedding's weight; False where it has
    none.

    The config on disk must say ``tie_word_embeddings: false`` from now on.
    """
    if getattr(getattr(model, "args", None), "tie_word_embeddings", None) is not True:
        return False
    table = get_module(model, residual_stream(model).tokens).weight
    model.lm_head = nn.Linear(table.shape[1], table.shape[0], bias=False)
    model.lm_head.weight = table
    model.args.tie_word_embeddings = False
    return True
