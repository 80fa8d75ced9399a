"""A host written by hand, a page of it: a small U of single blocks, as a package outside of mlxquant would have it.

Each block norms once; attention and MLP read the same tensor and are joined before one layer, as in FLUX's single
blocks. What the first block writes goes to the next one and, as a skip, to the last. With random weights.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxquant.grids.time import Clock
from mlxquant.layers.attention import SoftmaxAttention
from mlxquant.models.diffusion import DiffusionAdapter
from mlxquant.models.edges import Edge, Fold
from mlxquant.models.stages import Stage
from mlxquant.recipes.roles import Role
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.prompts import Prompt

D, HEADS, WIDE, TEXT, SIDE = 32, 8, 64, 8, 8
NORMS = {
    "rms": nn.RMSNorm,
    "layer": nn.LayerNorm,
    "group": lambda width: nn.GroupNorm(4, width),
}


class Block(nn.Module):
    """x + out(concat(attention(h), gelu(up(h)))) with h = norm(x + c)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = NORMS[norm](D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.up, self.out, self.attention = nn.Linear(D, WIDE), nn.Linear(D + WIDE, D), SoftmaxAttention()

    def __call__(self, x, c):
        h = self.norm(x + c[:, None])
        q, k, v = (f(h).reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        seen = self.attention(q, k, v).transpose(0, 2, 1, 3).reshape(x.shape)
        return x + self.out(mx.concatenate([seen, nn.gelu(self.up(h))], -1))


class Net(nn.Module):
    def __init__(self, norm="rms"):
        super().__init__()
        self.embed, self.text, self.join, self.head = (
            nn.Linear(3, D),
            nn.Linear(TEXT, D),
            nn.Linear(2 * D, D),
            nn.Linear(D, 3),
        )
        self.blocks = [Block(norm) for _ in range(3)]

    def enter(self, latent, pooled, t):
        c = self.text(pooled) + mx.cos(t[:, None] / 1000 * mx.arange(1, D + 1))
        return self.embed(latent.reshape(len(latent), -1, 3)), c

    def __call__(self, latent, pooled, t):
        x, c = self.enter(latent, pooled, t)
        x = skip = self.blocks[0](x, c)
        x = self.blocks[1](x, c)
        x = self.blocks[2](self.join(mx.concatenate([x, skip], -1)), c)
        return self.head(x).reshape(latent.shape)


class ByHand(DiffusionAdapter):
    name, cfg, steps, batch = "by-hand", 2.0, 4, 2

    def __init__(self, norm="rms"):
        self.module, self.clock, self.latent_shape, self.norm = Net(norm), Clock(), (SIDE, SIDE, 3), norm
        block = lambda i, run: Stage(f"blocks.{i}", (f"blocks.{i}", "join") if i == 2 else (f"blocks.{i}",), run)  # noqa: E731
        self._stages = (
            Stage("embed", ("embed", "text"), self._embed),
            *(block(i, run) for i, run in enumerate((self._down, self._middle, self._up))),
            Stage("head", ("head",), self._head),
        )

    stages = property(lambda self: self._stages)

    def _embed(self, state):
        x, c = self.module.enter(state["latent"], state["pooled"], state["t"])
        return {"latent": state["latent"], "x": x, "c": c}

    def _down(self, state):
        x = self.module.blocks[0](state["x"], state["c"])
        return state | {"x": x, "skip": x}

    def _middle(self, state):
        return state | {"x": self.module.blocks[1](state["x"], state["c"])}

    def _up(self, state):
        x = self.module.join(mx.concatenate([state["x"], state["skip"]], -1))
        return {key: value for key, value in state.items() if key != "skip"} | {
            "x": self.module.blocks[2](x, state["c"])
        }

    def _head(self, state):
        return {"velocity": self.module.head(state["x"]).reshape(state["latent"].shape)}

    def role(self, path):
        if not path.startswith("blocks"):
            return Role("join", careful=True) if path == "join" else "output" if path == "head" else "embedder"
        return "attention" if path[-2:] in (".q", ".k", ".v") else "mlp"

    def edges(self):
        found = []
        for b in (f"blocks.{i}" for i in range(3)):
            found += [
                Edge((f"{b}.q", f"{b}.k", f"{b}.v", f"{b}.up"), (Fold(f"{b}.norm", 0, D),)),
                Edge((f"{b}.out",), (Fold(f"{b}.v", 0, D),), mixes=D // HEADS, columns=(0, D)),
                Edge((f"{b}.out",), after="gelu", reorders=(Fold(f"{b}.up", 0, WIDE),), columns=(D, D + WIDE)),
            ]
        return tuple(found)

    def describe(self):
        return {"norm": self.norm}

    @classmethod
    def blank(cls, description):
        return cls(description["norm"])

    @classmethod
    def pretrained(cls, place=""):
        """Random weights, the same every time, in which every layer matters."""
        adapter, keys = cls(place or "rms"), iter(mx.random.split(mx.random.key(1), 200))
        random = lambda x: mx.random.normal(x.shape, key=next(keys)) * 0.2  # noqa: E731
        adapter.module.update(tree_map(random, adapter.module.parameters()))
        for block in adapter.module.blocks:
            block.norm.weight = 1 + block.norm.weight
        mx.eval(adapter.module.parameters())
        return adapter

    def encode(self, prompts):
        pooled = np.array([[np.cos(len(p) + 3 * i + p.count("e")) for i in range(TEXT)] for p in prompts], np.float32)
        return Conditioning(pooled=mx.array(pooled))

    def decode(self, latent):
        return np.clip(np.array(latent, np.float32) / 2 + 0.5, 0, 1)

    def prompts(self, purpose, count, seed=0):
        return [Prompt(seed + i, f"{purpose} {'e' * i}") for i in range(count)]
