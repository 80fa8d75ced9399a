"""``mflux:NAME[@PLACE]``: which of mflux's models is meant, and where its weights are.

mflux itself takes any word in which one of its names occurs for that model ("mydevice" is FLUX.1-dev). Here a name is a
name, and a folder says itself what it holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from ...errors import AdapterError, ArtifactError, reason

PREFIX = "mflux:"
RECORD = "mflux_model.json"  # what 'mflux-save' writes beside the components
INSTALL = "pip install mflux (on Linux: pip install --no-deps mflux==0.24.0, and what it then lacks; see docs/mflux.md)"
NEEDS_IMAGES = {  # and does not say so: saved as FLUX.1 is, or refused by its own pipeline only when it is to draw
    "dev-depth": "a depth map",
    "dev-fill": "an image and a mask",
    "dev-fill-catvton": "an image and a mask",
    "qwen-image-2.1-controlnet-union": "an image that controls it",
    "qwen-image-2.1-turbo-controlnet-union": "an image that controls it",
}
ASKED = ("self", "seed", "prompt", "num_inference_steps", "width", "height", "guidance", "negative_prompt")


@dataclass(frozen=True)
class MfluxName:
    """A model of mflux.

    Attributes:
        key: Its name in mflux's registry, such as "z-image-turbo".
        place: A hub id or a folder with its weights, of a fine-tune perhaps; "" for the model's own.
    """

    key: str
    place: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.key}" + (f"@{self.place}" if self.place else "")

    @classmethod
    def of(cls, reference: str) -> MfluxName:
        """What a reference means.

        Args:
            reference: ``mflux:NAME``, ``mflux:NAME@PLACE`` or a folder that 'mflux-save' or mlxquant wrote.

        Raises:
            AdapterError: mflux has no such model, or cannot save it, or is not installed.
            ArtifactError: The folder does not say which model it holds, or is not there.
        """
        if not reference.startswith(PREFIX):
            return cls(_key(_recorded(Path(reference))), str(Path(reference).absolute()))
        name, at, place = reference.removeprefix(PREFIX).partition("@")
        if at and not place:
            raise AdapterError(f"{reference}: nothing stands behind '@'; name a hub id or a folder, or leave '@' out")
        if place and (Path(place).exists() or place.startswith((".", "/", "~"))):
            folder = Path(place).expanduser()
            if not folder.is_dir():
                raise ArtifactError(f"{folder}: no such folder; expected one with the weights of {name}")
            place = str(folder.absolute())
        return cls(_key(name), place)


def is_mflux(reference: str) -> bool:
    """Whether a reference is to one of mflux's models: it says so, or is a folder in mflux's layout."""
    return reference.startswith(PREFIX) or (Path(reference) / RECORD).is_file()


def from_mflux(place: str) -> Any:
    """A module of mflux, or what stands in one (``"models.common.config.model_config.ModelConfig"``).

    Raises:
        AdapterError: mflux is not installed, or lacks something itself.
    """
    module, _, name = f"mflux.{place}".rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        found = "is not installed" if error.name == "mflux" else f"cannot be imported ({reason(error)})"
        raise AdapterError(f"mflux, which has this model, {found}; {INSTALL}") from error


def _recorded(folder: Path) -> str:
    """The name of the model in a folder of mflux's."""
    path = folder / RECORD
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        name = facts["base_model"] or facts["model_name"]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder}: holds no {RECORD}, so it does not say which model it is; pass mflux:NAME@{folder}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is damaged ({reason(error)}); pass mflux:NAME@{folder}") from error
    if not isinstance(name, str):
        raise ArtifactError(f"{path}: names no model but {name!r:.80}; pass mflux:NAME@{folder}")
    return name


def _key(name: str) -> str:
    """A name, alias or hub id as mflux's registry has it."""
    models = from_mflux("models.common.config.model_config.AVAILABLE_MODELS")
    found = [key for key, config in models.items() if name == key or name in config.aliases]
    found += [key for key, config in models.items() if name == config.model_name and config.controlnet_model is None]
    if not found:
        known = {*models, *(alias for one in models.values() for alias in one.aliases)}
        near = get_close_matches(name, sorted(known), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(models)}"
        raise AdapterError(f"mflux has no model {name!r:.80}; {hint} A fine-tune is named mflux:BASE@FOLDER")
    classes = from_mflux("models.common.cli.save.MODEL_CLASSES")
    if found[0] not in classes:
        why = from_mflux("models.common.cli.save.UNSUPPORTED_MODELS").get(found[0], "mflux cannot save it")
        raise AdapterError(f"{PREFIX}{found[0]} cannot be written as a folder: {why}")
    if needs := NEEDS_IMAGES.get(found[0], "") or ", ".join(_beside_prompts(classes[found[0]])):
        raise AdapterError(
            f"{PREFIX}{found[0]} draws from {needs}, and this draws from prompts alone; record its own pipeline with"
            " mq.recording (docs/any-module.md)"
        )
    return found[0]


def _beside_prompts(pipeline: Any) -> list[str]:
    """What a pipeline of mflux has to be given beside a prompt."""
    takes = signature(pipeline.generate_image).parameters
    more = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return [
        name
        for name, one in takes.items()
        if one.default is Parameter.empty and one.kind not in more and name not in ASKED
    ]
