"""Parts of a model that lie loose near its single file, as ComfyUI's users have them.

ComfyUI's ``models`` holds models in ``checkpoints`` and ``diffusion_models`` (once ``unet``), text encoders in
``text_encoders`` (once ``clip``), autoencoders in ``vae`` (ComfyUI's folder_paths.py), each with folders inside as the
user likes; Stability AI's repositories have ``text_encoders`` beside the model. So what is looked in is the file's own
folder, and folders of these names in it and in the three above it. What a file is its tensors say, as in ComfyUI's
detect_te_model; its name decides between several that would do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, reason
from ...files.hub import lazy_tensors
from ...files.tensor_layout import METADATA, entries, in_file, read_header
from .source import Tensors

PATTERN = "*.safetensors"
ABOVE = 3  # folders: ComfyUI/models/checkpoints/mine/a.safetensors has its text encoders two above its own
FLOATS = ("F16", "BF16", "F32")  # of tensors that can be computed with

log = logging.getLogger("mlxquant")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LooseKind:
    """A part that may lie in a file of its own.

    Attributes:
        title: What people call it.
        folders: Names of the folders that it may lie in, besides that of the model.
        usual: How names of such files begin, the first preferred.
        prefix: From the shapes of a file's tensors by name, and the denoiser's config, what stands before the names of
            the part's own; None where the file is something else.
        tensors: From the tensors without that prefix, those under transformers' or diffusers' names.
        named: Whether only a file with a usual name will do.
    """

    title: str
    folders: tuple[str, ...]
    usual: tuple[str, ...]
    prefix: Callable[[Shapes, Mapping[str, Any]], str | None]
    tensors: Callable[[Tensors], Tensors]
    named: bool = False


@dataclass(frozen=True)
class _Candidate:
    """A file that is such a part; ``refused`` says why its numbers cannot be computed with, if so."""

    path: Path
    prefix: str
    refused: str


class LooseFiles:
    """What lies near one single file.

    Args:
        file: The single file.
        kinds: By component what to look for.
        config: The denoiser's config.
        command: By component the command that downloads it to where it is looked for.
    """

    def __init__(
        self,
        file: Path,
        kinds: Mapping[str, LooseKind],
        config: Callable[[], Mapping[str, Any]],
        command: Callable[[str], str],
    ):
        self._file, self._kinds, self._config, self._command = file.absolute(), kinds, config, command
        self._found: dict[str, _Candidate | None] = {}
        self._headers: dict[Path, dict[str, Any]] | None = None

    def has(self, component: str) -> bool:
        """Whether there is a file of it, also one that cannot be computed with."""
        return self._candidate(component) is not None

    def tensors(self, component: str) -> Tensors:
        """Its tensors, read from the disk when they are used; empty where there is no file of it.

        Raises:
            ArtifactError: The only file is quantized already, or lacks a tensor.
        """
        found = self._candidate(component)
        if found is None:
            return {}
        kind = self._kinds[component]
        if found.refused:
            raise ArtifactError(
                f"{found.path}: {found.refused}; {kind.title} is needed in float16, bfloat16 or float32: get it with"
                f" '{self._command(component)}', or move this file away"
            )
        arrays = lazy_tensors(found.path)
        own = {
            name.removeprefix(found.prefix): value for name, value in arrays.items() if name.startswith(found.prefix)
        }
        try:
            return kind.tensors(own)
        except KeyError as error:
            raise ArtifactError(
                f"{found.path}: {kind.title} without {error}; get it with '{self._command(component)}'"
            ) from error

    def looked(self, component: str) -> str:
        """Where it was looked for, in words; "" for what never lies loose."""
        kind = self._kinds.get(component)
        if kind is None:
            return ""
        near = self._file.parent
        folders = [os.path.relpath(folder, near) for folder in self._folders(kind)]
        wanted = f" or {' or '.join(kind.folders)} above" if not folders else f" or in {', '.join(folders)}"
        return f", nor {kind.title} there{wanted}"

    def _candidate(self, component: str) -> _Candidate | None:
        if component not in self._kinds:
            return None
        if component not in self._found:
            self._found[component] = self._chosen(component)
        return self._found[component]

    def _chosen(self, component: str) -> _Candidate | None:
        kind = self._kinds[component]
        found = list(self._candidates(kind))
        whole = [one for one in found if not one.refused]
        for one in found if whole else ():
            if one.refused:
                log.warning("%s: %s; left out", one.path, one.refused)
        if not found:
            return None
        chosen = min(whole or found, key=lambda one: _rank(kind, one.path))
        others = [str(one.path) for one in whole if one is not chosen]
        besides = f", and not {', '.join(others)}" if others else ""
        log.warning("%s: %s (%s) is %s%s", self._file.name, component, kind.title, chosen.path, besides)
        return chosen

    def _candidates(self, kind: LooseKind) -> Iterator[_Candidate]:
        """Files of a kind, those of nearer folders first."""
        for path in dict.fromkeys(self._files(kind)):
            usual = _rank(kind, path) < len(kind.usual)
            if path == self._file or (kind.named and not usual):
                continue
            try:
                held = _header(path)
            except (OSError, ValueError) as error:
                if usual:
                    log.warning("%s: not a safetensors file, or a damaged one (%s); left out", path, reason(error))
                continue
            prefix = kind.prefix({name: tuple(entry["shape"]) for name, entry in held.items()}, self._config())
            if prefix is None:
                continue
            weights = {name: entry["dtype"] for name, entry in held.items() if name.endswith(".weight")}
            coded = next((name for name, dtype in weights.items() if dtype not in FLOATS), None)
            refused = f"{coded} is stored as {weights[coded]}, so the file is quantized already" if coded else ""
            yield _Candidate(path, prefix, refused)

    def _files(self, kind: LooseKind) -> Iterator[Path]:
        yield from sorted(self._file.parent.glob(PATTERN))
        for folder in self._folders(kind):
            yield from sorted(folder.rglob(PATTERN))

    def _folders(self, kind: LooseKind) -> list[Path]:
        """Those that are there."""
        above = [self._file.parent, *self._file.parent.parents[:ABOVE]]
        return [folder / name for folder in above for name in kind.folders if (folder / name).is_dir()]


def _rank(kind: LooseKind, path: Path) -> int:
    """Which of the usual names a file has, the first is 0; their number where it has none."""
    name = path.name.lower()
    return next((rank for rank, begins in enumerate(kind.usual) if name.startswith(begins)), len(kind.usual))


def _header(path: Path) -> dict[str, Any]:
    """What a file's header says of its tensors; raises ValueError where the file is damaged or another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = read_header(file, size)
    found = entries(header)
    if max((end for _, end, _ in in_file(found)), default=0) > size - len(header):
        raise ValueError("it ends inside of a tensor")
    found.pop(METADATA, None)
    return found
