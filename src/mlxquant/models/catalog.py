"""Model references to adapters. A new model of mlxquant's own is one file and one line here; any package brings its own
by an entry point of the group ``mlxquant.models``, and a program by ``register_model``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AdapterError, ArtifactError, reason
from ..files.hub import DESCRIPTIONS, hub_description, read_description
from .adapter import Adapter
from .checkpoints.open import REPOSITORY, open_source
from .diffusionkit.files import CHECKPOINT, HUB
from .pixart.config import ALPHA, SIGMA
from .unet.config import HUB_IDS as SD15_HUB


@dataclass(frozen=True)
class KnownModel:
    """Where an adapter is, the hub ids that stand for its model, and by what a folder with its weights is known: by a
    file, or by the pipeline of diffusers that its ``model_index.json`` names.
    """

    module: str
    adapter: str
    hub_ids: tuple[str, ...] = ()
    checkpoint: str = ""
    key: str = ""  # that the checkpoint has, where it is a JSON file that others have, too
    pipelines: tuple[str, ...] = ()

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds this model's weights."""
        path = folder / self.checkpoint
        if not self.checkpoint or not path.is_file():
            return False
        return not self.key or f'"{self.key}"' in path.read_text(encoding="utf-8", errors="replace")


SD3 = ("StableDiffusion3Pipeline",)


def _sd3(adapter: str, kind: str, *others: str, checkpoint: str = "") -> KnownModel:
    """A kind of Stable Diffusion 3, which its copies' config tells apart."""
    hub_ids = (f"stabilityai/stable-diffusion-{kind}", *others)
    return KnownModel("mlxquant.models.sd3.adapter", adapter, hub_ids, checkpoint, pipelines=SD3)


LANGUAGE = "mlx-lm"  # what any other hub id stands for
HOSTS = {"diffusionkit": "sd3-medium-diffusionkit"}  # models that run on another program's modules, as HOST:REFERENCE
MODELS = {  # by address: an adapter is imported when it is asked for, also one of a folder that imports this one (qat)
    "mmdit-shapes": KnownModel("mlxquant.models.shapes.adapter", "MMDiTShapes"),
    "sd3-medium": _sd3("SD3Medium", "3-medium-diffusers", HUB, checkpoint=CHECKPOINT),
    "sd3.5-medium": _sd3("SD35Medium", "3.5-medium"),
    "sd3.5-large": _sd3("SD35Large", "3.5-large"),
    "sd3.5-large-turbo": _sd3("SD35LargeTurbo", "3.5-large-turbo"),
    "sd3-medium-diffusionkit": KnownModel("mlxquant.models.diffusionkit.adapter", "SD3Medium"),
    "sd15": KnownModel(
        "mlxquant.models.unet.adapter", "StableDiffusion", SD15_HUB, pipelines=("StableDiffusionPipeline",)
    ),
    "pixart-alpha": KnownModel(
        "mlxquant.models.pixart.adapter", "PixArtAlpha", ALPHA, pipelines=("PixArtAlphaPipeline",)
    ),
    "pixart-sigma": KnownModel(
        "mlxquant.models.pixart.adapter", "PixArtSigma", SIGMA, pipelines=("PixArtSigmaPipeline",)
    ),
    "gpt": KnownModel("mlxquant.qat.adapter", "TrainedGPT", ("gpt-python",), checkpoint="config.json", key="mlxquant"),
    LANGUAGE: KnownModel("mlxquant.models.mlx_lm", "MLXLanguageModel", checkpoint="config.json", key="model_type"),
}
GROUP = "mlxquant.models"  # of entry points: a model's name, and where its adapter is
Kind = TypeVar("Kind", bound=type[Adapter])
_registered: dict[str, type[Adapter]] = {}
HUB_ID = rf"{REPOSITORY}|gpt2(-medium|-large|-xl)?"  # those of OpenAI's go without an owner, too


def register_model(kind: Kind) -> Kind:
    """Make a model known by the ``name`` of its adapter, as if it were one of mlxquant's own: ``mq.load(name)`` loads
    it, and saved models of it are found again.

    This holds for the running program. A package that is installed names its adapters instead, and the command line
    knows them, too: ``[project.entry-points."mlxquant.models"]``, ``my-host = "my_package.host:MyHost"``.

    Args:
        kind: A subclass of ``Adapter`` or ``DiffusionAdapter``; this is a decorator.

    Returns:
        The same class.

    Raises:
        AdapterError: It is no such class, or lacks something that an adapter has; or its name is another model's.

    Examples:
        >>> import mlxquant as mq
        >>> from mlxquant.models.shapes.adapter import MMDiTShapes
        >>> @mq.register_model
        ... class Mine(MMDiTShapes):
        ...     name = "mine"
        >>> mq.load("mine").name
        'mine'
    """
    name = _checked(kind, "register_model").name
    before = _registered.get(name)
    if name in MODELS or (before is not None and _address(before) != _address(kind)):
        owner = "mlxquant" if before is None else _address(before)
        raise AdapterError(f"{_address(kind)}: {name!r} is the name of a model of {owner}; give yours another")
    _registered[name] = kind
    return kind


def _address(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _checked(kind: Any, where: str, name: str | None = None) -> type[Adapter]:
    """An adapter that somebody else wrote, known as ``name``; raises AdapterError about what ``where`` gave when it is
    none.
    """
    if not (isinstance(kind, type) and issubclass(kind, Adapter)):
        raise AdapterError(f"{where}: expected a subclass of mlxquant.models.adapter.Adapter, found {kind!r:.80}")
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise AdapterError(f"{where}: {_address(kind)} is no whole adapter; define {missing}")
    own = getattr(kind, "name", None)
    if not isinstance(own, str) or not re.fullmatch(r"[\w.-]+", own):
        raise AdapterError(f"{where}: {_address(kind)} needs a name of letters, digits and '.-_', found {own!r:.80}")
    if name not in (None, own):
        raise AdapterError(
            f"{where}: {_address(kind)} calls itself {own!r} and not {name!r}; saved models go by the one, and"
            " references by the other: give both one name"
        )
    return kind


def _installed() -> dict[str, EntryPoint]:
    """What other packages say that they have, by name; nothing is imported. Raises AdapterError where two packages mean
    different models by one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if found.setdefault(entry.name, entry).value != entry.value:
            raise AdapterError(
                f"two installed packages have a model {entry.name!r}: {found[entry.name].value} and {entry.value};"
                " uninstall one of them"
            )
    return {name: entry for name, entry in found.items() if name not in MODELS and name not in _registered}


def _others() -> dict[str, type[Adapter]]:
    """All adapters that are not mlxquant's own, imported."""
    return {**_registered, **{name: _loaded(entry) for name, entry in _installed().items()}}


def _loaded(entry: EntryPoint) -> type[Adapter]:
    """The adapter of an installed package; raises AdapterError when it cannot be imported, or is none."""
    where = f"entry point {GROUP}:{entry.name} of {entry.dist.name if entry.dist else 'an installed package'}"
    try:
        kind = entry.load()
    except Exception as error:  # whatever somebody else's module raises
        raise AdapterError(
            f"{where}: {entry.value} cannot be imported ({reason(error)}); reinstall the package"
        ) from error
    return _checked(kind, where, entry.name)


def known_models() -> list[str]:
    """Names of all models that there are."""
    return [*MODELS, *_registered, *_installed()]


def find_model(reference: str) -> tuple[str, str]:
    """The model's name, and where its weights are: a hub id, a folder, a file, or "" for the model's usual place.

    Args:
        reference: A name, a hub id, a folder with a checkpoint or a single file; or a name and where its weights are,
            as NAME@PLACE. A repository that is not one of ours is asked what it holds. With ``diffusionkit:`` before
            it, that program's modules run the model.

    Raises:
        ArtifactError: On a folder without a checkpoint, and a repository that cannot be asked.
        AdapterError: On anything else; it says what there is.
    """
    if reference in known_models():
        return reference, ""
    host, _, hosted = reference.partition(":")
    if host in HOSTS:
        return HOSTS[host], _absolute("" if hosted in known_models() else hosted)
    name, at, place = reference.partition("@")
    if at and name in known_models():
        return name, _placed(place, reference)
    for name, entry in MODELS.items():
        if reference in entry.hub_ids:
            return name, reference
    folder = Path(reference)
    if not folder.is_dir() and re.fullmatch(HUB_ID, reference):
        for name, kind in _others().items():
            if reference in kind.hub_ids:
                return name, reference
        said = hub_description(reference, "evaluate", "pass a local folder with --model")
        if "_class_name" not in said and "model_type" in said:
            return LANGUAGE, reference
        if drawn := _of_pipeline(said.get("_class_name"), reference):
            return drawn, reference
        raise _not_run(reference, said)
    if folder.is_file() and (drawn := _of_pipeline(open_source(reference).pipeline, reference)):
        return drawn, _absolute(reference)
    if not folder.is_dir():
        raise AdapterError(
            f"unknown model {reference!r}: neither a folder, nor a hub id (OWNER/NAME), nor one of"
            f" {', '.join([*known_models(), 'gpt-python'])}"
        )
    for name, entry in MODELS.items():
        if entry.is_in(folder):
            return name, str(folder.absolute())
    for name, kind in _others().items():
        if kind.holds(folder):
            return name, str(folder.absolute())
    if (folder / "model.json").exists():
        raise ArtifactError(
            f"{folder} holds a quantized model; this needs the full-precision one: a name, a hub id or a folder with"
            " its weights"
        )
    if (folder / DESCRIPTIONS[0]).exists():
        said = read_description(folder / DESCRIPTIONS[0])
        if drawn := _of_pipeline(said.get("_class_name"), reference):
            return drawn, _absolute(reference)
        raise _not_run(reference, said)
    wanted = dict.fromkeys([*(entry.checkpoint for entry in MODELS.values() if entry.checkpoint), DESCRIPTIONS[0]])
    raise ArtifactError(
        f"{folder} holds no model: expected a folder written by 'mlxquant quantize' (model.json), or one with"
        f" {' or '.join(wanted)}"
    )


def _placed(place: str, reference: str) -> str:
    """Where the weights of a named model are said to be; raises AdapterError where that is no place."""
    if not Path(place).exists() and not re.fullmatch(HUB_ID, place):
        raise AdapterError(f"{reference}: {place!r} is neither a folder, nor a file, nor a hub id")
    return _absolute(place)


def _absolute(place: str) -> str:
    """A folder or a file as it is found from anywhere; a hub id, or "", as it is."""
    return str(Path(place).absolute()) if place and Path(place).exists() else place


def _of_pipeline(pipeline: str | None, place: str) -> str | None:
    """The model that draws what a pipeline of diffusers draws; None for none of ours. Of several the copy's config
    decides.
    """
    names = [name for name, entry in MODELS.items() if pipeline in entry.pipelines]
    if len(names) < 2:
        return names[0] if names else None
    source = open_source(place)
    return next((name for name in names if adapter_class(name).fits(source)), None)


def _not_run(place: str, said: dict[str, Any]) -> AdapterError:
    """The error about a repository or a folder that holds something else, with what can be done."""
    if "_class_name" in said:
        found = f"diffusers' {said['_class_name']}"
        then = (
            "once its modules are in MLX, mq.quantize_linears quantizes their weights (docs/any-module.md), and an"
            " adapter makes it a model (docs/new-model.md)"
        )
    else:
        found = f"no model that tells its kind: no model_type in {' or '.join(DESCRIPTIONS)}"
        then = "check the hub id"
    pictures = ", ".join(name for name in known_models() if name not in (LANGUAGE, "gpt"))
    return AdapterError(
        f"{place} holds {found}. This release runs {pictures}, gpt-python and language models of mlx-lm; {then}"
    )


def model_name(reference: str | None) -> str | None:
    """The name of the model that a reference stands for; None for None. Raises AdapterError as ``find_model`` does."""
    return None if reference is None else find_model(reference)[0]


def adapter_class(name: str) -> Any:
    """The adapter of a model by its name; raises AdapterError, listing the known names, on an unknown one."""
    if name in _registered:
        return _registered[name]
    if name not in MODELS:
        if (found := _installed().get(name)) is not None:
            return _loaded(found)
        raise AdapterError(
            f"unknown model {name!r}; there are {sorted(known_models())}; where it is another package's, install that,"
            " or import it first"
        )
    entry = MODELS[name]
    return getattr(import_module(entry.module), entry.adapter)


def pretrained(reference: str) -> Adapter:
    """A model with its full-precision weights; see ``find_model``."""
    name, place = find_model(reference)
    adapter: Adapter = adapter_class(name).pretrained(place)
    return adapter
