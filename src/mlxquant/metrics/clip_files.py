"""Where the published CLIPs lie, and how their texts become numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ArtifactError
from .clip import Clip
from .weights import EXTRA, Weights, read_tensors, shared

L14 = Weights("CLIP ViT-L/14", "openai/clip-vit-large-patch14", ("model.safetensors", "tokenizer.json"), "MIT")
L14_336 = Weights("CLIP ViT-L/14@336", "openai/clip-vit-large-patch14-336", ("pytorch_model.bin",), "MIT")


def tokenizer(path: Path, positions: int) -> Callable[[str], list[int]]:
    """Text to ids from a ``tokenizer.json``; AdapterError without the package tokenizers, ArtifactError on another
    file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise AdapterError(f"CLIP's texts need the package tokenizers: pip install 'mlxquant[{EXTRA}]'") from error
    try:
        loaded: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise ArtifactError(f"{path}: not a tokenizer.json ({error}); get it with '{L14.command}'") from error
    loaded.no_padding()
    loaded.enable_truncation(positions)

    def tokenize(text: str) -> list[int]:
        ids = loaded.encode(text).ids
        if len(ids) < 2:
            raise ArtifactError(
                f"{path}: adds no begin and end tokens, so it is not CLIP's; get it with '{L14.command}'"
            )
        return list(ids)

    return tokenize


def read(weights: Path, words: Path | None) -> Clip:
    """Any CLIP of transformers' with heads of 64 channels and OpenAI's activation; pictures alone without a
    ``tokenizer.json``.
    """
    arrays = read_tensors(weights)
    if words is None:
        return Clip(arrays, str(weights))
    positions = arrays.get("text_model.embeddings.position_embedding.weight")
    if positions is None:
        raise ArtifactError(f"{weights}: holds no text tower; expected {L14.repository}'s model.safetensors")
    return Clip(arrays, str(weights), tokenizer(words, positions.shape[0]))


def large(clip: Clip, side: int, source: str) -> Clip:
    """A model that is ViT-L/14 at ``side`` pixels; ArtifactError otherwise, for other CLIPs give other figures."""
    found = clip.sizes.vision.width, clip.sizes.vision.depth, clip.sizes.patch, clip.sizes.side
    expected = 1024, 24, 14, side
    if found != expected:
        raise ArtifactError(
            f"{source}: a CLIP of width, depth, patch and side {found}, expected ViT-L/14's {expected}; another model's"
            " file"
        )
    return clip


@shared
def load(place: str | Path | None) -> Clip:
    """ViT-L/14 at 224 pixels, for pictures and texts."""
    weights, words = L14.paths(place)
    return large(read(weights, words), 224, str(weights))


@shared
def load_336(place: str | Path | None) -> Clip:
    """ViT-L/14 at 336 pixels, for pictures alone."""
    (weights,) = L14_336.paths(place)
    return large(read(weights, None), 336, str(weights))
