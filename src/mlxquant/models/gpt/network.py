"""A GPT with GPT-2's parameter names and equations as mlx-lm has them: a checkpoint of one loads in the other.

Every tensor that quantization-aware training may quantize passes a ``Seam``, a module without parameters that does
nothing, so that it can be found by its path and replaced: the tree of parameters is the same with and without.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import AdapterError, ArtifactError
from ...files import schema
from ...layers.fast_cpu import gelu_tanh, softmax
from ...layers.tree import parameters
from ..catalog import pretrained

MODEL_TYPE = "gpt2"  # in a config.json
USUAL = {  # what a config.json may say, or leave out, of a GPT-2 with the equations that are here
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
HIDDEN = -1e9  # the score of a token in the future


CONFIG = schema.entries(
    {
        "vocab_size": schema.whole(1),
        "n_positions": schema.whole(1),
        "n_embd": schema.whole(1, schema.WIDTH),
        "n_head": schema.whole(1, schema.WIDTH),
        "n_layer": schema.whole(1, schema.DEPTH),
    },
    {"layer_norm_epsilon": schema.number(0, 1)},
)


@dataclass(frozen=True)
class GPTConfig:
    """``config.json`` of a GPT-2, under its names. ``n_ctx`` is ``n_positions`` under an older name."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_head: int
    n_layer: int
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ArtifactError(
                f"a GPT of width {self.n_embd} cannot have {self.n_head} heads; expected a divisor of the width"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["GPT2LMHeadModel"],
            "n_ctx": self.n_positions,
            **asdict(self),
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> GPTConfig:
        """Raises ArtifactError when an entry is missing, or no size of a model."""
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - {"layer_norm_epsilon"} - set(facts)):
            raise ArtifactError(f"config.json of a {MODEL_TYPE}: missing {missing}")
        try:
            CONFIG(facts, "")
        except schema.MismatchError as error:
            raise ArtifactError(f"config.json of a {MODEL_TYPE}: {error}; write the folder anew") from error
        return cls(**{name: facts[name] for name in known if name in facts})


class Seam(nn.Module):
    """A place where a tensor passes unchanged."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class Attention(nn.Module):
    """Causal self-attention. Its seams, in the order in which the tensors pass them, are where training may quantize an
    activation.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self._heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.input, self.output = Seam(), Seam()
        self.qk_mult_q_input, self.qk_mult_k_input, self.softmax_input = Seam(), Seam(), Seam()
        self.pv_mult_p_input, self.pv_mult_v_input, self.pv_mult_output = Seam(), Seam(), Seam()

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """x [B,T,D]; mask [T,S] float32, 0 or ``HIDDEN``."""
        batch, length, width = x.shape
        q, k, v = mx.split(self.c_attn(self.input(x)), 3, axis=-1)
        q, k, v = (part.reshape(batch, length, self._heads, -1).transpose(0, 2, 1, 3) for part in (q, k, v))
        q, k, v = self.qk_mult_q_input(q), self.qk_mult_k_input(k), self.pv_mult_v_input(v)
        scores = (q * q.shape[-1] ** -0.5).astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2)
        p = self.pv_mult_p_input(softmax(self.softmax_input(scores) + mask))
        y = self.pv_mult_output((p.astype(v.dtype) @ v).transpose(0, 2, 1, 3).reshape(batch, length, width))
        return self.output(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.input, self.activation_input, self.activation_output, self.output = Seam(), Seam(), Seam(), Seam()

    def __call__(self, x: mx.array) -> mx.array:
        return self.output(
            self.c_proj(self.activation_output(gelu_tanh(self.activation_input(self.c_fc(self.input(x))))))
        )


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPTBody(nn.Module):
    """Everything but the projection to the vocabulary."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self._positions = config.n_positions

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        if length > self._positions:  # MLX would read what lies behind the table
            raise AdapterError(
                f"{length} tokens at once, and this GPT has {self._positions} positions; use shorter windows of text"
            )
        x = self.wte(tokens) + self.wpe(mx.arange(length))
        mask = causal_mask(length)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)


class GPT(nn.Module):
    """Tokens [B,T] to logits [B,T,V]. The projection to the vocabulary is the token embedding, transposed.

    Args:
        config: ``GPTConfig``: the vocabulary, the positions, the width, the heads and the layers.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = GPTBody(config)

    @classmethod
    def from_pretrained(cls, reference: str) -> GPT:
        """A GPT with its weights: one of ours, or a GPT-2 that mlx-lm loads.

        Args:
            reference: What ``mlxquant.load`` takes: "gpt2" or another hub id, "gpt-python", or a folder. A GPT that was
                trained through rounding comes with the integers that it learned.

        Returns:
            The model, in the dtype of its file; ``config`` says how large it is.

        Raises:
            AdapterError: On another kind of model, and without mlx-lm where it has to load it.
            ArtifactError: When it cannot be loaded; the error says why.
        """
        adapter: Any = pretrained(reference)
        if isinstance(adapter.module, GPT):
            return adapter.module
        config = getattr(adapter, "config", {})
        if config.get("model_type") != MODEL_TYPE:
            kind = config.get("model_type", adapter.name)
            raise AdapterError(f"{reference} is a {kind} and no {MODEL_TYPE}; mlxquant.load loads it")
        if other := {name: config[name] for name, usual in USUAL.items() if config.get(name, usual[0]) not in usual}:
            raise AdapterError(f"{reference} computes otherwise than GPT-2 ({other}); expected {USUAL}")
        model = cls(GPTConfig.from_dict(config))
        model.load_weights(list(parameters(adapter.module).items()))
        mx.eval(model.parameters())
        return model

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.model.wte.as_linear(self.model(tokens))

    @property
    def layers(self) -> list[Block]:
        return self.model.h


def causal_mask(length: int) -> mx.array:
    """[T,T] float32: 0 for the past and the present, ``HIDDEN`` for the future."""
    place = mx.arange(length)
    return mx.where(place[:, None] >= place[None], 0.0, HIDDEN)
