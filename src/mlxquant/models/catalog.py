"""Model references to adapters. A new model is one file and one line here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ArtifactError
from ..files.hub import DESCRIPTIONS, hub_description, read_description
from .adapter import Adapter
from .sd3.files import CHECKPOINT, HUB


@dataclass(frozen=True)
class KnownModel:
    """Where an adapter is, the hub ids that stand for its model, and the file by which a local folder with its weights
    is known.
    """

    module: str
    adapter: str
    hub_ids: tuple[str, ...] = ()
    checkpoint: str = ""
    key: str = ""  # that the checkpoint has, where it is a JSON file that others have, too

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds this model's weights."""
        path = folder / self.checkpoint
        if not self.checkpoint or not path.is_file():
            return False
        return not self.key or f'"{self.key}"' in path.read_text(encoding="utf-8", errors="replace")


LANGUAGE = "mlx-lm"  # what any other hub id stands for
MODELS = {  # by address: an adapter is imported when it is asked for, also one of a folder that imports this one (qat)
    "mmdit-shapes": KnownModel("mlxquant.models.shapes.adapter", "MMDiTShapes"),
    "sd3-medium": KnownModel("mlxquant.models.sd3.adapter", "SD3Medium", (HUB,), checkpoint=CHECKPOINT),
    "gpt": KnownModel("mlxquant.qat.adapter", "TrainedGPT", ("gpt-python",), checkpoint="config.json", key="mlxquant"),
    LANGUAGE: KnownModel("mlxquant.models.mlx_lm", "MLXLanguageModel", checkpoint="config.json", key="model_type"),
}
HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+|gpt2(-medium|-large|-xl)?"  # those of OpenAI's go without an owner, too


def find_model(reference: str) -> tuple[str, str]:
    """The model's name, and where its weights are: a hub id, a folder, or "" for the model's usual place.

    Args:
        reference: A name, a hub id or a folder with a checkpoint. A repository that is not one of ours is asked what it
            holds.

    Raises:
        ArtifactError: On a folder without a checkpoint, and a repository that cannot be asked.
        AdapterError: On anything else; it says what there is.
    """
    if reference in MODELS:
        return reference, ""
    for name, entry in MODELS.items():
        if reference in entry.hub_ids:
            return name, reference
    folder = Path(reference)
    if not folder.is_dir() and re.fullmatch(HUB_ID, reference):
        said = hub_description(reference, "evaluate", "pass a local folder with --model")
        if "_class_name" not in said and "model_type" in said:
            return LANGUAGE, reference
        raise _not_run(reference, said)
    if not folder.is_dir():
        known = [*MODELS, *(hub_id for entry in MODELS.values() for hub_id in entry.hub_ids)]
        raise AdapterError(
            f"unknown model {reference!r}: neither a folder, nor a hub id of a language model, nor one of {known}"
        )
    for name, entry in MODELS.items():
        if entry.is_in(folder):
            return name, str(folder.absolute())
    if (folder / "model.json").exists():
        raise ArtifactError(
            f"{folder} holds a quantized model; this needs the full-precision one: a name, a hub id or a folder with"
            " its weights"
        )
    if (folder / DESCRIPTIONS[0]).exists():
        raise _not_run(reference, read_description(folder / DESCRIPTIONS[0]))
    wanted = dict.fromkeys(entry.checkpoint for entry in MODELS.values() if entry.checkpoint)
    raise ArtifactError(
        f"{folder} holds no model: expected a folder written by 'mlxquant quantize' (model.json), or one with"
        f" {' or '.join(wanted)}"
    )


def _not_run(place: str, said: dict[str, Any]) -> AdapterError:
    """The error about a repository or a folder that holds something else, with what can be done."""
    if "_class_name" in said:
        found = f"diffusers' {said['_class_name']}"
        then = "once its modules are in MLX, mq.quantize_linears quantizes their weights (docs/any-module.md)"
    else:
        found = f"no model that tells its kind: no model_type in {' or '.join(DESCRIPTIONS)}"
        then = "check the hub id"
    pictures = ", ".join(name for name in MODELS if name not in (LANGUAGE, "gpt"))
    return AdapterError(
        f"{place} holds {found}. This release runs {pictures}, gpt-python and language models of mlx-lm; {then}"
    )


def model_name(reference: str | None) -> str | None:
    """The name of the model that a reference stands for; None for None. Raises AdapterError as ``find_model`` does."""
    return None if reference is None else find_model(reference)[0]


def adapter_class(name: str) -> Any:
    """The adapter of a model by its name; raises AdapterError, listing the known names, on an unknown one."""
    if name not in MODELS:
        raise AdapterError(f"unknown model {name!r}; this release has {sorted(MODELS)}")
    entry = MODELS[name]
    return getattr(import_module(entry.module), entry.adapter)


def pretrained(reference: str) -> Adapter:
    """A model with its full-precision weights; see ``find_model``."""
    name, place = find_model(reference)
    kind = adapter_class(name)
    adapter: Adapter = kind.pretrained(place) if place else kind.pretrained()
    return adapter
