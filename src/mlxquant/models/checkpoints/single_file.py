"""An original single file, as ComfyUI's users have them: the denoiser, and more or less of what stands around it.

Which family's it is, its tensors' names say, and the sizes of every part their shapes. What the file does not have is
looked for in the folder that it lies in, under the names that diffusers gives, then in files of its own, see
``loose_files``, and then in the repository of the hub that the model belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import ArtifactError, reason
from ...files.hub import lazy_tensors
from .comfyui_tokenizers import ComfyUITokenizers
from .folder import DiffusersFolder
from .loose_files import LooseFiles, LooseKind
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
        original: The repository of the hub, and its file, that has the model in 16 bits, by the names of the tensors of
            a file of the family.
        denoiser: The component that every file has.
        together: Components of which a file that has any wants no other: SD3 draws without T5, too.
        loose: By component what may lie in a file of its own.
        published: By component its file in the ``original`` repository.
        tokenizers: By component its folder in ComfyUI's own.
    """

    pipeline: str
    title: str
    fits: Callable[[Collection[str]], bool]
    tensors: Mapping[str, Callable[[Tensors], Tensors]]
    configs: Mapping[str, Callable[[Tensors], dict[str, Any]]]
    components: tuple[str, ...]
    scheduler: dict[str, Any]
    repository: Callable[[dict[str, Any]], str]
    original: Callable[[Collection[str]], tuple[str, str]]
    denoiser: str = "transformer"
    together: tuple[str, ...] = ()
    loose: Mapping[str, LooseKind] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)

    def command(self, names: Collection[str]) -> str:
        """The command that downloads a file of the family like one with tensors of these names."""
        return " ".join(["hf download", *self.original(names)])


class Beside(DiffusersFolder):
    """What lies beside a file: the folders of components, with or without a ``model_index.json``. Of the ``shared``
    names ComfyUI has folders, too, without a config.
    """

    def __init__(self, folder: Path, pipeline: str, repository: Callable[[], str], shared: Collection[str]):
        self.place, self.pipeline = str(folder), pipeline
        self._folder, self._repository, self._shared = folder, repository, shared

    def has(self, component: str) -> bool:
        place = Path(self.place) / component
        return place.is_dir() and (component not in self._shared or (place / "config.json").is_file())

    def _command(self, name: str) -> str:
        return self.command(name)

    def command(self, name: str) -> str:
        """The command that brings files of a component."""
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
                f" bfloat16 or float32: get such a file with '{found.command(arrays.keys())}'"
            )
        self._own = cache(self._read)  # for their names and shapes: who computes with tensors gets others
        self._names = frozenset(arrays)
        shared = {folder for kind in found.loose.values() for folder in kind.folders}
        self._beside = Beside(self._path.parent, self.pipeline, self._repository, shared)
        self._loose = LooseFiles(self._path, found.loose, self._denoiser_config, self._loose_command)
        self._comfyui = ComfyUITokenizers(self._path, self.pipeline, found.tokenizers)
        self._hub = cache(self._open_hub)

    def has(self, component: str) -> bool:
        layout = self._layout
        if component not in layout.components or self._is_here(component):
            return component in layout.components
        others = [other for other in layout.together if other != component]
        left_out = component in layout.together and any(map(self._own, others))
        return not (left_out or (component in layout.loose and others and all(map(self._loose.has, others))))

    def config(self, component: str) -> dict[str, Any]:
        if own := self._own(component) or self._near(component):
            return self._layout.configs[component](own)
        if component == "scheduler" and not self._beside.has(component):
            return dict(self._layout.scheduler)
        return self._elsewhere(component).config(component)

    def tensors(self, component: str) -> Tensors:
        return self._read(component) or self._near(component) or self._elsewhere(component).tensors(component)

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
                f" file again with '{self._layout.command(arrays.keys())}'"
            ) from error

    def _is_here(self, component: str) -> bool:
        """Whether a component is on this disk."""
        return bool(self._own(component)) or self._beside.has(component) or self._is_loose(component)

    def _is_loose(self, component: str) -> bool:
        """Whether a component is to come from a file of its own. A file with text encoders is not given others."""
        together = self._layout.together
        whole = component in together and any(map(self._own, together))
        return not whole and not self._beside.has(component) and self._loose.has(component)

    def _near(self, component: str) -> Tensors:
        """A component's tensors in a file of its own; empty where it has none, or where others come first."""
        return self._loose.tensors(component) if self._is_loose(component) else {}

    def _loose_command(self, component: str) -> str:
        """The command that downloads a component to where it is looked for."""
        (repository, _), name = self._layout.original(self._names), self._layout.published.get(component)
        if name is None:
            return self._beside.command(f"{component}/*")
        return f"hf download {repository} {name} --local-dir {self._path.parent}"

    def _denoiser_config(self) -> dict[str, Any]:
        return self.config(self._layout.denoiser)

    def _elsewhere(self, component: str) -> Source:
        """Where a component is that is not in this file: beside it where it has a folder there, in ComfyUI, or on the
        hub.
        """
        near: tuple[Source, ...] = (self._beside, self._comfyui)
        return next((source for source in near if source.has(component)), None) or self._hub(component)

    def _repository(self) -> str:
        """The repository of the hub that has the rest."""
        return self._layout.repository(self._denoiser_config())

    def _open_hub(self, component: str) -> Source:
        try:
            return DiffusersFolder(self._repository())
        except ArtifactError as error:
            where = (
                f"{self.place} has no {component}, nor a folder {component} beside it{self._loose.looked(component)}"
            )
            if component not in self._layout.published:
                raise ArtifactError(f"{where}; of the hub's {error}") from error
            repository, _ = self._layout.original(self._names)
            raise ArtifactError(
                f"{where}: accept the licence at https://huggingface.co/{repository}, run 'hf auth login', then"
                f" '{self._loose_command(component)}'"
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
            f" safetensors, which is had with {' or '.join(repr(layout.command(())) for layout in layouts)}"
        )
    if path.suffix != SUFFIX:
        raise ArtifactError(
            f"{path}: expected a file {SUFFIX}; pickles (.ckpt, .pt, .bin) run what is in them and are not read: get"
            " the same model as safetensors"
        )
