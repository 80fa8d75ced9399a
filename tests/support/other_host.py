"""A small picture model that differs from SD3 in what a host can differ in: masked text without a pooled embedding, a
learned null token, embedded guidance or none, packed latents, rows that cannot be joined, pictures that are no squares.

One joint attention block over image and text tokens, then another; each has a GELU MLP. Pixels are 8 times the latents.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.errors import AdapterError
from mlxquant.grids.time import Clock
from mlxquant.layers.attention import SoftmaxAttention
from mlxquant.models.diffusion import DiffusionAdapter
from mlxquant.models.stages import Stage
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.prompts import Prompt

WIDTH, HEADS, TEXT, LONGEST, PIXELS = 16, 2, 6, 9, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sdpa = SoftmaxAttention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)

    def __call__(self, x, mask):
        b, n, d = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(b, n, HEADS, -1).swapaxes(1, 2) for f in (self.q, self.k, self.v))
        read = self.sdpa(q, k, v, scale=(d // HEADS) ** -0.5, mask=mask)
        x = x + self.o(read.swapaxes(1, 2).reshape(b, n, d))
        return x + self.fc2(nn.gelu(self.fc1(self.norm(x))))


class Host(DiffusionAdapter):
    """``options``: guidance, alone, packed, null (a learned other side), cfg."""

    name = "other-host"
    steps = 3

    def __init__(self, size=(4, 6), **options):
        self.options = {"guidance": "classifier-free", "alone": False, "packed": False, "null": False, **options}
        self.guidance, self.alone = self.options["guidance"], self.options["alone"]
        self.cfg = 1.0 if self.guidance == "none" else 2.0
        self.batch = self.rows = 1 if self.alone else 2
        self.clock, self.latent_shape = Clock(), (*size, 4)
        self.module = nn.Module()
        self.module.embed = nn.Linear(16 if self.options["packed"] else 4, WIDTH)
        self.module.context, self.module.time = nn.Linear(TEXT, WIDTH), nn.Linear(2, WIDTH)
        self.module.blocks = [Block(), Block()]
        self.module.head = nn.Linear(WIDTH, 16 if self.options["packed"] else 4)
        mx.random.seed(11)
        self.module.apply(lambda x: mx.random.normal(x.shape) * (0.25 if x.ndim == 2 else 0.05))
        for block in self.module.blocks:
            block.norm.weight = mx.ones(WIDTH)
        self.module.freeze()
        mx.eval(self.module.parameters())
        self.passes = []  # rows and text tokens of each forward pass
        self._stages = (
            Stage("embed", ("embed", "context", "time"), self._embed),
            *(Stage(f"blocks.{i}", (f"blocks.{i}",), lambda state, i=i: self._block(i, state)) for i in range(2)),
            Stage("head", ("head",), self._head),
        )

    def _embed(self, state):
        rows = len(state["t"])
        tokens, seen = state["tokens"], state["mask"]
        if self.alone:
            assert rows == 1, f"{rows} rows where each has a forward pass of its own"
            length = int(seen.sum().item())
            tokens, seen = tokens[:, :length], seen[:, :length]
        self.passes.append(tokens.shape[:2])
        latent = state["latent"]
        image = self.module.embed(latent.reshape(rows, -1, latent.shape[-1]))
        time = state["t"] / 1000
        weight = state.get("guidance", mx.zeros(rows)) / 10
        image = image + self.module.time(mx.stack([time, weight], axis=-1))[:, None]
        state = {"latent": latent, "x": mx.concatenate([image, self.module.context(tokens)], axis=1)}
        if self.alone:  # nothing is padded
            return state
        return state | {"mask": mx.concatenate([mx.ones(image.shape[:2], mx.bool_), seen], axis=1)[:, None, None]}

    def _block(self, index, state):
        return state | {"x": self.module.blocks[index](state["x"], state.get("mask"))}

    def _head(self, state):
        latent = state["latent"]
        count = int(np.prod(latent.shape[1:-1]))
        return {"velocity": self.module.head(state["x"][:, :count]).reshape(latent.shape)}

    @property
    def stages(self):
        return self._stages

    @property
    def size(self):
        return self.latent_shape[1] * PIXELS, self.latent_shape[0] * PIXELS

    def latent_of(self, width, height):
        if width % (2 * PIXELS) or height % (2 * PIXELS):
            raise AdapterError(f"{self.name} draws multiples of {2 * PIXELS} pixels")
        return height // PIXELS, width // PIXELS, 4

    def pack(self, latent):
        if not self.options["packed"]:
            return latent
        b, h, w, c = latent.shape
        return latent.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, 4 * c)

    def unpack(self, predicted, shape):
        if not self.options["packed"]:
            return predicted
        h, w, c = shape
        x = predicted.reshape(-1, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, h, w, c)

    def encode(self, prompts):
        lengths = np.array([min(1 + len(p.split()), LONGEST) for p in prompts])
        numbers = np.zeros((len(prompts), LONGEST, TEXT), np.float32)
        for row, prompt in enumerate(prompts):
            words = ["", *prompt.split()][:LONGEST]
            numbers[row, : len(words)] = [np.cos(np.arange(TEXT) + sum(map(ord, word))) for word in words]
            numbers[row, len(words) :] = 100.0  # a padded token is loud
        mask = np.arange(LONGEST) < lengths[:, None]
        return Conditioning(tokens=mx.array(numbers), mask=mx.array(mask))

    def unconditional(self, count, negative=None):
        if negative is not None or not self.options["null"]:
            return super().unconditional(count, negative)
        mask = mx.broadcast_to(mx.arange(LONGEST) < 2, (count, LONGEST))
        return Conditioning(tokens=mx.full((count, LONGEST, TEXT), 0.5), mask=mask)

    def decode(self, latent):
        picture = 1 / (1 + np.exp(-np.array(latent[..., :3], np.float32)))
        return picture.repeat(PIXELS, 1).repeat(PIXELS, 2)

    def role(self, path):
        kinds = {"q": "attention", "k": "attention", "v": "attention", "o": "attention", "head": "output"}
        return kinds.get(path.rsplit(".", 1)[-1], "mlp" if path.startswith("blocks") else "embedder")

    def describe(self):
        return {"size": list(self.latent_shape[:2]), "options": self.options}

    @classmethod
    def pretrained(cls, place=""):
        return cls()

    @classmethod
    def blank(cls, description):
        return cls(tuple(description["size"]), **description["options"])

    def prompts(self, purpose, count, seed=0):
        words = ("red", "old", "tree", "in", "fog", "by", "the", "sea", "at", "night")
        return [Prompt(seed + i, " ".join(words[: 1 + 2 * i % 9])) for i in range(count)]
