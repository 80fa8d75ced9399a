"""Where an SD3 comes from: a folder of diffusers, a single file, a hub id, or the files that DiffusionKit downloads."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from ...files.hub import read_description
from ..checkpoints.open import open_source
from ..checkpoints.sd3_file import SD3_FILE
from ..checkpoints.source import Source, Tensors, float_tensors
from ..diffusionkit.files import CHECKPOINT, HUB, Files

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
TOKENIZERS = {"tokenizer": "tokenizer_l", "tokenizer_2": "tokenizer_g"}
SPECIAL = "special_tokens_map.json"  # these folders have none for CLIP-G, which pads with "!"
CLIP_FILES, T5_FILES = ("vocab.json", "merges.txt"), ("spiece.model", "tokenizer_config.json", SPECIAL)
T5, LARGEST_ID = "t5/t5xxl.safetensors", {"eos_token_id": 2}  # by which a CLIP finds the end of a prompt


def open_sd3(place: str) -> Source:
    """The source that a place is.

    Args:
        place: A folder of the diffusers layout, one that DiffusionKit reads, a single file, or a hub id.

    Raises:
        ArtifactError: It is none of these, or damaged; it says what to do.
    """
    return DiffusionKitFiles(place) if place == HUB or (Path(place) / CHECKPOINT).is_file() else open_source(place)


class DiffusionKitFiles(Source):
    """``sd3_medium.safetensors`` with the text encoders beside it, as argmaxinc publishes and DiffusionKit downloads
    them; see ``diffusionkit.files``.
    """

    pipeline = SD3_FILE.pipeline

    def __init__(self, place: str):
        self.place, self._files = place, Files(place)

    def has(self, component: str) -> bool:
        return component in SD3_FILE.components

    def config(self, component: str) -> dict[str, Any]:
        if component == "scheduler":
            return dict(SD3_FILE.scheduler)
        if component in ENCODERS:
            return LARGEST_ID | read_description(self._files.path(f"{ENCODERS[component]}/config.json"))
        return SD3_FILE.configs[component](self.tensors(component))

    def tensors(self, component: str) -> Tensors:
        if component in ENCODERS:
            return float_tensors(self._files.path(f"{ENCODERS[component]}/model.fp16.safetensors"))
        if component == "text_encoder_3":
            return float_tensors(self._files.path(T5))
        path = self._files.path(CHECKPOINT)
        try:
            return SD3_FILE.tensors[component](float_tensors(path))
        except KeyError as error:
            raise ArtifactError(
                f"{path}: no SD3, {error} is missing; get it again with '{self._files.command(CHECKPOINT)}'"
            ) from error

    def file(self, component: str, name: str) -> Path:
        if component in TOKENIZERS:
            return self._files.path(f"{TOKENIZERS[component]}/{name}")
        return self._files.t5_file(name)

    def finds(self, component: str, name: str) -> Path | None:
        if component == "tokenizer_2" and name == SPECIAL:
            return Path(str(files("mlxquant.assets") / "clip-g" / SPECIAL))
        if name not in (CLIP_FILES if component in TOKENIZERS else T5_FILES):
            return None
        try:
            return self.file(component, name)
        except ArtifactError:  # as has been asked, it is not there
            return None
