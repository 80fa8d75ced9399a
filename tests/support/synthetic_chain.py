"""A model that is nothing but a chain: small layers and large hidden states, as a picture model has them, and counters
of what it is asked.

``embed`` and ``head`` around residual blocks of one Linear each; states hold the latent [B,H,W,4] and image [B,N,D].
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.grids.time import Clock
from mlxquant.models.diffusion import DiffusionAdapter
from mlxquant.models.stages import Stage
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.prompts import Prompt

TEXT = 8  # width of the conditioning, of one token


class Chain(DiffusionAdapter):
    name = "chain"
    cfg = 2.0
    batch = 2

    def __init__(self, blocks=3, width=64, side=16):
        keys = iter(mx.random.split(mx.random.key(3), blocks + 3))
        self.shape = (blocks, width, side)
        self.module, self.clock, self.latent_shape = nn.Module(), Clock(), (side, side, 4)
        self.module.embed, self.module.context = nn.Linear(4, width), nn.Linear(TEXT, width)
        self.module.blocks = [nn.Linear(width, width) for _ in range(blocks)]
        self.module.head = nn.Linear(width, 4)
        for layer in (self.module.embed, self.module.context, *self.module.blocks, self.module.head):
            layer.weight = mx.random.normal(layer.weight.shape, key=next(keys)) * 0.3
            layer.bias = mx.zeros(layer.bias.shape)
        self.module.freeze()
        mx.eval(self.module.parameters())
        self.encoded = Counter()  # how often each prompt was encoded
        self.drawn = []  # prompts of each batch that was sampled
        self.seen = []  # rows of each forward pass through the first block
        self._stages = (
            Stage("embed", ("embed", "context"), self._embed),
            *(Stage(f"blocks.{i}", (f"blocks.{i}",), lambda state, i=i: self._block(i, state)) for i in range(blocks)),
            Stage("head", ("head",), self._head),
        )

    def _embed(self, state):
        latent = state["latent"]
        image = self.module.embed(latent).reshape(len(latent), -1, self.shape[1])
        return {
            "latent": latent,
            "image": image + self.module.context(state["tokens"]) + mx.cos(state["t"])[:, None, None],
        }

    def _block(self, index, state):
        if index == 0:
            self.seen.append(len(state["image"]))
        x = state["image"]
        return state | {"image": x + nn.relu(self.module.blocks[index](x))}

    def _head(self, state):
        return {"velocity": self.module.head(state["image"]).reshape(state["latent"].shape)}

    @property
    def stages(self):
        return self._stages

    def encode(self, prompts):
        self.encoded.update(prompts)
        numbers = np.array([[[float(len(p) + i) for i in range(TEXT)]] for p in prompts], np.float32)
        tokens = mx.cos(mx.array(numbers))
        return Conditioning(tokens=tokens, pooled=tokens[:, 0])

    def generate(self, prompts, seeds, *rest, **more):
        self.drawn.append(list(prompts))
        return super().generate(prompts, seeds, *rest, **more)

    def decode(self, latent):
        return np.clip(np.array(latent[..., :3]), 0, 1)

    def role(self, path):
        return {"embed": "embedder", "context": "embedder", "head": "output"}.get(path, "mlp")

    def describe(self):
        return {"shape": list(self.shape)}

    @classmethod
    def pretrained(cls, place=""):
        return cls()

    @classmethod
    def blank(cls, description):
        return cls(*description["shape"])

    def prompts(self, purpose, count, seed=0):
        return [Prompt(seed + i, "x" * (i + 1)) for i in range(count)]
