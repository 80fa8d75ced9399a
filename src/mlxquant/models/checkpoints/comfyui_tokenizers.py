"""The tokenizers in ComfyUI's own source, beside its ``models``: ``comfy/sd1_tokenizer`` for every CLIP and
``comfy/text_encoders/t5_tokenizer``. Who has models in ComfyUI's folders needs no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .source import Source, Tensors

ABOVE = 4  # folders: ComfyUI/models/checkpoints/mine/a.safetensors
CLIP, T5 = "comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer"
SPECIAL, PADDED = "special_tokens_map.json", "tokenizer_2"  # CLIP-G, which pads with "!" (sdxl_clip.py: pad_with_end)


class ComfyUITokenizers(Source):
    """Those near a single file.

    Args:
        file: The single file.
        pipeline: What would run it.
        named: By component its folder in ComfyUI's.
    """

    def __init__(self, file: Path, pipeline: str, named: Mapping[str, str]):
        self.place, self.pipeline = str(file), pipeline
        above = file.absolute().parents[:ABOVE]
        self._folders = {
            component: found
            for component, name in named.items()
            if (found := next((folder / name for folder in above if (folder / name).is_dir()), None))
        }

    def has(self, component: str) -> bool:
        return component in self._folders

    def finds(self, component: str, name: str) -> Path | None:
        if component == PADDED and name == SPECIAL:
            return Path(str(files("mlxquant.assets") / "clip-g" / SPECIAL))
        path = self._folders[component] / name
        return path if path.is_file() else None

    def file(self, component: str, name: str) -> Path:
        path = self.finds(component, name)
        if path is None:
            raise ArtifactError(
                f"{self._folders[component]} has no {name}; it is ComfyUI's own: update ComfyUI, or put a folder"
                f" {component} with it beside {self.place}"
            )
        return path

    def config(self, component: str) -> dict[str, Any]:
        raise ArtifactError(f"{self._folders[component]} has no config")

    def tensors(self, component: str) -> Tensors:
        raise ArtifactError(f"{self._folders[component]} has no weights")
