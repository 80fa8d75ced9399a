"""An original single file, as ComfyUI's users have them: the denoiser, and more or less of what stands around it.

Which family's it is, its tensors' names say, and the sizes of every part their shapes. What the file does not have is
looked for in the folder that it lies in, under the names that diffusers gives, and then in the repository of the hub
that the model belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import ArtifactError, reason
from ...files.hub import lazy_tensors
from .folder import DiffusersFolder
from .source import Source, Tensors

SUFFIX = ".safetensors"
GGUF = b"GGUF"  # what such a file begins with


@dataclass(frozen=True)
class Layout:
    """What is in the single files of a family of models.

    Attributes:
        pipeline: The class of diffusers that would run it.
        title: What people call it.
        fits: Whether these names of tensors are of this family.
        tensors: By component how its tensors come out of the file's, under diffusers' or transformers' names and not
            read; without any where the file lacks the component. Raises KeyError on a tensor that is missing.
        configs: By component what its config.json would say, from these tensors.
        components: All that its pipeline has.
        scheduler: What its scheduler_config.json says.
        repository: The repository of the hub in diffusers' layout that has the rest, by the denoiser's config.
        original: The command that downloads a file of the family in 16 bits, by the names of the tensors of one.
        denoiser: The component that every file has.
        together: Components of which a file that has any wants no other: SD3 draws without T5, too.
    """

    pipeline: str
    title: str
    fits: Callable[[Collection[str]], bool]
    tensors: Mapping[str, Callable[[Tensors], Tensors]]
    configs: Mapping[str, Callable[[Tensors], dict[str, Any]]]
    components: tuple[str, ...]
    scheduler: dict[str, Any]
    repository: Callable[[dict[str, Any]], str]
    original: Callable[[Collection[str]], str]
    denoiser: str = "transformer"
    together: tuple[str, ...] = ()


class Beside(DiffusersFolder):
    """What lies beside a file: the folders of components, with or without a ``model_index.json``."""

    def __init__(self, folder: Path, pipeline: str, repository: Callable[[], str]):
        self.place, self.pipeline = str(folder), pipeline
        self._folder, self._repository = folder, repository

    def has(self, component: str) -> bool:
        return (Path(self.place) / component).is_dir()

    def _command(self, name: str) -> str:
        return f"hf download {self._repository()} --include '{name}' --local-dir {self.place}"


class SingleFile(Source):
    """A file of tensors in safetensors' format."""

    def __init__(self, place: str, layouts: Collection[Layout]):
        """Open it; nothing but its header is read.

        Args:
            place: Its path.
            layouts: The families that are known.

        Raises:
            ArtifactError: It is no such file, is quantized already, or is of another family.
        """
        self.place, self._path = place, Path(place)
        _refuse_other_formats(self._path, layouts)
        arrays = lazy_tensors(self._path)
        found = next((layout for layout in layouts if layout.fits(arrays.keys())), None)
        if found is None:
            known = " or ".join(layout.title for layout in layouts)
            some = ", ".join(sorted(arrays)[:2]) or "no tensors"
            raise ArtifactError(
                f"{place}: no single file of {known}: it has {some}; pass a file of one of these, or a folder in the"
                " layout of diffusers"
            )
        self._layout, self.pipeline = found, found.pipeline
        coded = next((name for name, value in arrays.items() if value.dtype in (mx.uint8, mx.int8)), None)
        if coded is not None:
            raise ArtifactError(
                f"{place}: {coded} is stored in 8 bits, so the file is quantized already (fp8); expected float16,"
                f" bfloat16 or float32: get such a file with '{found.original(arrays.keys())}'"
            )
        self._own = cache(self._read)  # for their names and shapes: who computes with tensors gets others
        self._beside = Beside(self._path.parent, self.pipeline, self._repository)
        self._hub = cache(self._open_hub)

    def has(self, component: str) -> bool:
        layout = self._layout
        if component not in layout.components or self._own(component) or self._beside.has(component):
            return component in layout.components
        return not (component in layout.together and any(map(self._own, layout.together)))

    def config(self, component: str) -> dict[str, Any]:
        if own := self._own(component):
            return self._layout.configs[component](own)
        if component == "scheduler" and not self._beside.has(component):
            return dict(self._layout.scheduler)
        return self._elsewhere(component).config(component)

    def tensors(self, component: str) -> Tensors:
        return self._read(component) or self._elsewhere(component).tensors(component)

    def file(self, component: str, name: str) -> Path:
        return self._elsewhere(component).file(component, name)

    def finds(self, component: str, name: str) -> Path | None:
        return self._elsewhere(component).finds(component, name)

    def _read(self, component: str) -> Tensors:
        """A component's tensors in this file, not read yet; empty where it has none."""
        take, arrays = self._layout.tensors.get(component), lazy_tensors(self._path)
        try:
            return {} if take is None else take(arrays)
        except (KeyError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"{self.place}: the {component} lacks a tensor or has one of another shape ({reason(error)}); get the"
                f" file again with '{self._layout.original(arrays.keys())}'"
            ) from error

    def _elsewhere(self, component: str) -> Source:
        """Where a component is that is not in this file: beside it where it has a folder there, else on the hub."""
        return self._beside if self._beside.has(component) else self._hub(component)

    def _repository(self) -> str:
        """The repository of the hub that has the rest."""
        return self._layout.repository(self.config(self._layout.denoiser))

    def _open_hub(self, component: str) -> Source:
        try:
            return DiffusersFolder(self._repository())
        except ArtifactError as error:
            raise ArtifactError(
                f"{self.place} has no {component}, nor a folder {component} beside it; of the hub's {error}"
            ) from error


def _refuse_other_formats(path: Path, layouts: Collection[Layout]) -> None:
    """Raise ArtifactError on a file that is not of tensors as safetensors has them."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    with path.open("rb") as file:
        begins = file.read(len(GGUF))
    if begins == GGUF:
        raise ArtifactError(
            f"{path} is a GGUF file, quantized already for other programs; expected the full-precision model as"
            f" safetensors, which is had with {' or '.join(repr(layout.original(())) for layout in layouts)}"
        )
    if path.suffix != SUFFIX:
        raise ArtifactError(
            f"{path}: expected a file {SUFFIX}; pickles (.ckpt, .pt, .bin) run what is in them and are not read: get"
            " the same model as safetensors"
        )
