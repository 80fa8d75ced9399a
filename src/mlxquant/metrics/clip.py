"""CLIP's two towers (arXiv 2103.00020, ViT-L/14): pictures and texts as points on one sphere.

Parameters have the names of transformers' CLIPModel; every size but the width of a head is read from their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import AdapterError, ArtifactError, reason
from .images import Images, checked, eight_bits
from .weights import Tensors, fitted

BATCH = 8
HEAD = 64  # channels of an attention head, in all CLIPs with vision transformers
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tower:
    """Sizes of a transformer."""

    prefix: str
    width: int
    hidden: int
    depth: int
    positions: int


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the parameters say. Without ``text`` there is only the picture tower."""

    vision: Tower
    text: Tower | None
    patch: int
    words: int
    joint: int

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return self.patch * round((self.vision.positions - 1) ** 0.5)

    @classmethod
    def of(cls, arrays: Mapping[str, mx.array], texts: bool, source: str) -> Sizes:
        """ArtifactError when the tensors are not those of a CLIP."""
        try:
            patches, words = arrays["vision_model.embeddings.patch_embedding.weight"], 0
            if texts:
                words = arrays["text_model.embeddings.token_embedding.weight"].shape[0]
            joint = arrays["visual_projection.weight"].shape[0]
            text = _tower(arrays, "text_model.") if texts else None
            return cls(_tower(arrays, "vision_model."), text, patches.shape[-1], words, joint)
        except (KeyError, IndexError, ValueError) as error:
            raise ArtifactError(
                f"{source}: not a CLIP model as transformers saves it ({reason(error)}); another network's file"
            ) from error


def _tower(arrays: Mapping[str, mx.array], prefix: str) -> Tower:
    positions, width = arrays[f"{prefix}embeddings.position_embedding.weight"].shape
    depth = len({name.split(".")[3] for name in arrays if name.startswith(f"{prefix}encoder.layers.")})
    return Tower(prefix, width, arrays[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0], depth, positions)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter that is used."""
    vision, width = sizes.vision, sizes.vision.width
    found: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, sizes.patch, sizes.patch),
        "visual_projection.weight": (sizes.joint, width),
        **_norm("vision_model.pre_layrnorm", width),  # transformers' spelling
        **_norm("vision_model.post_layernorm", width),
        **_transformer(vision),
    }
    if sizes.text is not None:
        width = sizes.text.width
        found |= {
            "text_model.embeddings.token_embedding.weight": (sizes.words, width),
            "text_projection.weight": (sizes.joint, width),
            **_norm("text_model.final_layer_norm", width),
            **_transformer(sizes.text),
        }
    return found


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _transformer(tower: Tower) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        f"{tower.prefix}embeddings.position_embedding.weight": (tower.positions, tower.width)
    }
    for index in range(tower.depth):
        layer = f"{tower.prefix}encoder.layers.{index}"
        for name in ("layer_norm1", "layer_norm2"):
            found |= _norm(f"{layer}.{name}", tower.width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"{layer}.self_attn.{name}", tower.width, tower.width)
        found |= _linear(f"{layer}.mlp.fc1", tower.hidden, tower.width) | _linear(
            f"{layer}.mlp.fc2", tower.width, tower.hidden
        )
    return found


class Clip:
    """Encodes pictures, and texts where the tokenizer is given, into rows of unit length."""

    def __init__(self, arrays: Mapping[str, mx.array], source: str, tokenize: Callable[[str], list[int]] | None = None):
        """``tokenize`` takes a text to its ids, from the begin to the end token. ArtifactError, naming ``source``, on
        other arrays.
        """
        self.sizes = Sizes.of(arrays, tokenize is not None, source)
        self._weights: Tensors = fitted(arrays, shapes(self.sizes), source)
        self._tokenize = tokenize

    def images(self, pictures: mx.array) -> mx.array:
        """Unit embeddings [B,E] of normalised pictures [B,side,side,3]."""
        weights, tower = self._weights, self.sizes.vision
        kernel = weights["vision_model.embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1)
        x = mx.conv2d(pictures, kernel, stride=self.sizes.patch).reshape(len(pictures), -1, tower.width)
        first = mx.broadcast_to(weights["vision_model.embeddings.class_embedding"], (len(pictures), 1, tower.width))
        x = mx.concatenate([first, x], axis=1) + weights["vision_model.embeddings.position_embedding.weight"]
        x = self._encode(tower, self._normalise("vision_model.pre_layrnorm", x), None)
        x = self._normalise("vision_model.post_layernorm", x[:, 0])
        return _unit(x @ weights["visual_projection.weight"].T)

    def texts(self, ids: Sequence[Sequence[int]]) -> mx.array:
        """Unit embeddings [B,E] of token ids, each text's own number of them, ending in the end token."""
        assert self.sizes.text is not None
        weights, tower, longest = self._weights, self.sizes.text, max(map(len, ids))
        padded = mx.array(
            [[*row, *[0] * (longest - len(row))] for row in ids]
        )  # the causal mask hides what comes after the end
        x = weights["text_model.embeddings.token_embedding.weight"][padded]
        x = x + weights["text_model.embeddings.position_embedding.weight"][:longest]
        mask = mx.triu(mx.full((longest, longest), -mx.inf), k=1)
        x = self._normalise("text_model.final_layer_norm", self._encode(tower, x, mask))
        ends = x[mx.arange(len(ids)), mx.array([len(row) - 1 for row in ids])]
        return _unit(ends @ weights["text_projection.weight"].T)

    def encode_texts(self, texts: Sequence[str]) -> Features:
        """Unit embeddings [B,E] of texts; those that are too long for CLIP are cut, as everywhere."""
        if self._tokenize is None:
            raise AdapterError("clip: this model was loaded for pictures alone, without a tokenizer")
        ids = [self._tokenize(text) for text in texts]
        return np.concatenate([np.array(self.texts(ids[i : i + BATCH])) for i in range(0, len(ids), BATCH)])

    def encode_images(self, images: Images, resize: Callable[[Image.Image, int], Image.Image]) -> Features:
        """Unit embeddings [B,E] of pictures [B,H,W,3] in [0,1]; ``resize`` brings one to the model's side."""
        images = checked(images, "clip")
        found = []
        for start in range(0, len(images), BATCH):
            small = [np.asarray(resize(eight_bits(image), self.sizes.side)) for image in images[start : start + BATCH]]
            found.append(np.array(self.images(mx.array((np.stack(small).astype(np.float32) / 255 - MEAN) / STD))))
        return np.concatenate(found)

    def _normalise(self, name: str, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], 1e-5)

    def _linear(self, name: str, x: mx.array) -> mx.array:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _encode(self, tower: Tower, x: mx.array, mask: mx.array | None) -> mx.array:
        for index in range(tower.depth):
            layer = f"{tower.prefix}encoder.layers.{index}"
            x = x + self._attend(f"{layer}.self_attn", self._normalise(f"{layer}.layer_norm1", x), mask)
            y = self._linear(f"{layer}.mlp.fc1", self._normalise(f"{layer}.layer_norm2", x))
            x = x + self._linear(f"{layer}.mlp.fc2", y * mx.sigmoid(1.702 * y))  # OpenAI's quick GELU
        return x

    def _attend(self, name: str, x: mx.array, mask: mx.array | None) -> mx.array:
        batch, length, width = x.shape
        q, k, v = (
            self._linear(f"{name}.{part}_proj", x).reshape(batch, length, width // HEAD, HEAD).transpose(0, 2, 1, 3)
            for part in "qkv"
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5, mask=mask)
        return self._linear(f"{name}.out_proj", y.transpose(0, 2, 1, 3).reshape(batch, length, width))


def _unit(x: mx.array) -> mx.array:
    return x / mx.sqrt((x * x).sum(axis=-1, keepdims=True))
