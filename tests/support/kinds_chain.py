"""A model of every kind of layers: a chain that draws, with convolutions that are strided, grouped and transposed, a
switch layer of experts, and a table of embeddings by the noise level.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.grids.time import Clock
from mlxquant.layers.switch import SwitchLinear
from mlxquant.models.catalog import register_model
from mlxquant.models.diffusion import DiffusionAdapter
from mlxquant.models.stages import Stage
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.prompts import Prompt

WIDTH, EXPERTS, TEXT = 16, 3, 8


@register_model
class Kinds(DiffusionAdapter):
    """Latents [B,side,side,4], of an even side."""

    name = "kinds-of-layers"
    cfg = 1.0
    batch = 2

    def __init__(self, side=8):
        self.shape = side
        self.module, self.clock, self.latent_shape = nn.Module(), Clock(), (side, side, 4)
        module = self.module
        module.embed, module.context = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Linear(TEXT, WIDTH)
        module.levels = nn.Embedding(8, WIDTH)
        module.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        module.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4)
        module.up = nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1)
        module.experts = SwitchLinear(WIDTH, WIDTH, EXPERTS)
        module.head = nn.Conv2d(WIDTH, 4, 1)
        random = np.random.default_rng(3)
        for layer in module.children().values():
            scale = 2 * layer.weight[0].size ** -0.5 if layer.weight.ndim != 3 else 0.5
            layer.weight = mx.array(random.normal(size=layer.weight.shape).astype(np.float32) * scale)
            if "bias" in layer:
                layer.bias = mx.array(random.normal(size=layer.bias.shape).astype(np.float32) * 0.1)
        module.freeze()
        mx.eval(module.parameters())
        self._stages = (
            Stage("embed", ("embed", "context", "levels"), self._embed),
            Stage("convolutions", ("down", "grouped", "up"), self._convolutions),
            Stage("experts", ("experts",), self._experts),
            Stage("head", ("head",), self._head),
        )

    def _embed(self, state):
        level = mx.clip(state["t"] / 125, 0, 7).astype(mx.int32)
        added = self.module.levels(level)[:, None, None] + self.module.context(state["tokens"])[:, :, None]
        return {"latent": state["latent"], "image": self.module.embed(state["latent"]) + added}

    def _convolutions(self, state):
        x = state["image"]
        inner = nn.relu(self.module.grouped(nn.relu(self.module.down(x))))
        return state | {"image": x + self.module.up(inner)}

    def _experts(self, state):
        x = state["image"]
        chosen = mx.stop_gradient(mx.argmax(x[..., :EXPERTS], axis=-1))
        return state | {"image": x + nn.relu(self.module.experts(x[..., None, :], chosen)[..., 0, :])}

    def _head(self, state):
        return {"velocity": self.module.head(nn.relu(state["image"]))}

    @property
    def stages(self):
        return self._stages

    def encode(self, prompts):
        numbers = np.array([[[float(len(p) + i) for i in range(TEXT)]] for p in prompts], np.float32)
        tokens = mx.cos(mx.array(numbers))
        return Conditioning(tokens=tokens, pooled=tokens[:, 0])

    def decode(self, latent):
        return np.clip(np.array(latent[..., :3]), 0, 1)

    def role(self, path):
        return {"embed": "embedder", "context": "embedder", "head": "output"}.get(path, "mlp")

    def describe(self):
        return {"side": self.shape}

    @classmethod
    def pretrained(cls, place=""):
        return cls()

    @classmethod
    def blank(cls, description):
        return cls(description["side"])

    def prompts(self, purpose, count, seed=0):
        return [Prompt(seed + i, "x" * (i + 1)) for i in range(count)]
