"""A folder of the diffusers layout, on this disk or on the hub.

``model_index.json`` names the components; each has a folder with a config and weights, in one file or in shards with an
index, in full precision or as the variant "fp16". Where there are both, full precision is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from ...files import schema
from ...files.hub import first_hub_file, hub_files, read_description
from ...files.schema import MismatchError
from .source import Source, Tensors, float_tensors

INDEX = "model_index.json"
CONFIGS = {"scheduler": "scheduler_config.json"}  # of all others it is config.json
STEMS = ("diffusion_pytorch_model", "model")  # of weights: diffusers' own modules, transformers'
EXTRA, INSTEAD = "images", "pass a local folder with --model"
SHARDS = schema.entries({"weight_map": schema.table_of(schema.inside, least=1)})
NAMED = schema.maybe(schema.array_of(schema.maybe(schema.text)))  # [library, class] of a component


def _weight_files() -> Iterator[str]:
    """Names that a component's weights can have, those that are preferred first."""
    for variant in ("", ".fp16"):
        for stem in STEMS:
            yield f"{stem}{variant}.safetensors.index.json"
            if variant:  # as other releases of diffusers and transformers have written it
                yield f"{stem}.safetensors.index{variant}.json"
            yield f"{stem}{variant}.safetensors"


class DiffusersFolder(Source):
    """A local folder, or a repository of the hub, whose files are downloaded when they are asked for."""

    def __init__(self, place: str):
        """Open it.

        Args:
            place: A folder with ``model_index.json``, or a hub id.

        Raises:
            ArtifactError: It has no such file, or a damaged one; or it cannot be had.
        """
        self.place = place
        self._folder = Path(place) if Path(place).is_dir() else None
        if self._folder is None:
            (path,) = hub_files(place, [INDEX], EXTRA, INSTEAD)
        elif not (path := self._folder / INDEX).is_file():
            raise ArtifactError(
                f"{place} has no {INDEX}: expected a folder in the layout of diffusers, as 'hf download' fetches it"
            )
        index = read_description(path)
        self.pipeline = str(index.get("_class_name", ""))
        try:
            self._components = {name: said for name, said in index.items() if isinstance(said, list)}
            schema.table_of(NAMED)(self._components, "")
        except MismatchError as error:
            raise ArtifactError(f"{path}: {error}; download it again") from error

    def has(self, component: str) -> bool:
        return any(self._components.get(component, ()))

    def config(self, component: str) -> dict[str, Any]:
        path = self.file(component, CONFIGS.get(component, "config.json"))
        if said := read_description(path, infinite=True):
            return said
        raise ArtifactError(
            f"{path}: says nothing; expected a JSON object with the {component}'s config: download it again"
        )

    def tensors(self, component: str) -> Tensors:
        path = self._first([f"{component}/{name}" for name in _weight_files()])
        if path is None:
            found = "" if self._folder is None else self._told_instead(self._folder / component)
            raise ArtifactError(
                f"{self.place}: {component} has no weights as safetensors{found}; get them with"
                f" '{self._command(f'{component}/*.safetensors')}'"
            )
        return self._sharded(component, path) if path.suffix == ".json" else float_tensors(path)

    def file(self, component: str, name: str) -> Path:
        path = self.finds(component, name)
        if path is None:
            whole = self._folder is not None and not (self._folder / component).is_dir()
            raise ArtifactError(
                f"{self.place} has no {component}/{name}; get it with"
                f" '{self._command(f'{component}/*' if whole else f'{component}/{name}')}'"
            )
        return path

    def finds(self, component: str, name: str) -> Path | None:
        return self._first([f"{component}/{name}"])

    def _first(self, names: Sequence[str]) -> Path | None:
        """The first of some files that there is."""
        if self._folder is None:
            return first_hub_file(self.place, names, EXTRA, INSTEAD)
        return next((path for name in names if (path := self._folder / name).is_file()), None)

    def _sharded(self, component: str, index: Path) -> Tensors:
        """The tensors of all shards; each has to be where the index says."""
        said = read_description(index)
        try:
            SHARDS(said, "")
        except MismatchError as error:
            raise ArtifactError(f"{index}: {error}; download it again") from error
        where: dict[str, str] = said["weight_map"]
        found: Tensors = {}
        for shard in sorted(set(where.values())):
            if self._folder is None:
                (path,) = hub_files(self.place, [f"{component}/{shard}"], EXTRA, INSTEAD)
            else:
                path = self.file(component, shard)
            arrays = float_tensors(path)
            if missing := next((name for name, at in where.items() if at == shard and name not in arrays), None):
                raise ArtifactError(f"{path}: {index.name} says that {missing} is in it; download both again")
            found |= {name: value for name, value in arrays.items() if where.get(name) == shard}
        return found

    def _told_instead(self, folder: Path) -> str:
        """What a component's folder has in the place of weights that can be read."""
        if not folder.is_dir():
            return f" (no folder {folder})"
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".gguf", ".pt", ".ckpt"))
        return f", but {found[0]}" if found else ""

    def _command(self, name: str) -> str:
        """The command that downloads some of its files."""
        place, where = (self.place, "") if self._folder is None else ("HUB_ID", f" --local-dir {self._folder}")
        return f"hf download {place} --include '{name}'{where}"
