"""Published weights of the networks that some metrics look through: which file, under which licence, and how to get it.

A network's tensors are read from the hub's cache, downloaded once, or taken from a file or folder of the user's.
safetensors files and the checkpoints of PyTorch are read; nothing in a checkpoint is executed, see ``torch_file``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import mlx.core as mx

from ..errors import ArtifactError
from ..files.checked import file_digest
from ..files.hub import hub_files, lazy_tensors
from .torch_file import read_checkpoint

Tensors = dict[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]
Network = TypeVar("Network")
EXTRA = "evaluate"
INSTEAD = "give a local file or folder with --weights"


@dataclass(frozen=True)
class Weights:
    """A network's files in one repository on the hub. ``sha256`` is how the first file's digest begins, where it is
    known.
    """

    network: str
    repository: str
    files: tuple[str, ...]
    licence: str
    sha256: str = ""

    @property
    def command(self) -> str:
        """What to type to get the files."""
        return f"hf download {self.repository} {' '.join(self.files)}"

    def paths(self, place: str | Path | None = None) -> list[Path]:
        """The files on this disk: from ``place``, the first file itself or a folder with all of them by name, else from
        the hub.

        Raises ArtifactError when one is missing, AdapterError when it takes a download and huggingface_hub is not
        installed.
        """
        if place is None:
            return hub_files(self.repository, self.files, EXTRA, INSTEAD)
        folder = Path(place)
        if folder.is_file():
            found = [folder, *(folder.parent / Path(name).name for name in self.files[1:])]
        else:
            found = [
                next((p for p in (folder / name, folder / Path(name).name) if p.is_file()), folder / name)
                for name in self.files
            ]
        for path in found:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; get it with '{self.command} --local-dir {folder}'")
        return found

    def is_published(self, path: Path) -> bool:
        """Whether a file is byte for byte the published one; False, too, where no digest is known."""
        return bool(self.sha256) and file_digest(path).startswith(self.sha256)


def shared(load: Callable[[str | Path | None], Network]) -> Callable[[str | Path | None], Network]:
    """A loader that hands out the same network again, by the place it came from, as long as someone still uses it."""
    alive: WeakValueDictionary[str | Path | None, Network] = WeakValueDictionary()

    @wraps(load)
    def loaded(place: str | Path | None = None) -> Network:
        network = alive.get(place)
        if network is None:
            alive[place] = network = load(place)
        return network

    return loaded


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file or of a PyTorch checkpoint; ArtifactError on any other, or a damaged one."""
    if path.suffix != ".safetensors":
        found = read_checkpoint(path)
        return {name: mx.array(found.pop(name)) for name in list(found)}  # not twice in memory
    return lazy_tensors(path)


def fitted(arrays: Mapping[str, mx.array], shapes: Shapes, source: str) -> Tensors:
    """The tensors that a network wants, as float32, out of those of a file; ArtifactError when one is missing or has
    another shape.
    """
    if missing := sorted(set(shapes) - set(arrays)):
        raise ArtifactError(
            f"{source}: {len(missing)} of {len(shapes)} tensors are missing, such as {missing[0]}; another network's"
            " file"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ArtifactError(
                f"{source}: {name} has shape {arrays[name].shape}, expected {shape}; another network's file"
            )
    return {name: arrays[name].astype(mx.float32) for name in shapes}
