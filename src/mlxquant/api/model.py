"""The notebook's view: load, calibrate, quantize, compare, save. The command line calls the same functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..calibration import trajectories
from ..calibration.corpus import read_corpus
from ..calibration.text import TextCalibration, collect_text
from ..calibration.trajectories import Calibration
from ..errors import AdapterError, ArtifactError, CalibrationError, NumericsError, RecipeError
from ..files import artifacts
from ..files.artifacts import versions
from ..layers.attention import QuantizedAttention, find_quantized_attentions
from ..layers.linear import QuantizedLinear, find_quantized
from ..layers.model_size import Size
from ..layers.plain import restored
from ..layers.tree import parameters, set_module
from ..metrics.prediction import Prediction, predict
from ..models.adapter import Adapter
from ..models.catalog import adapter_class, pretrained
from ..models.diffusion import DiffusionAdapter, diffusion
from ..models.language import LanguageAdapter, language
from ..pipeline.apply import TrackFiles
from ..progress import Progress, silent
from ..recipes.presets import parse_recipe
from ..recipes.recipe import LayerSpec, Recipe
from ..report.comparison import Comparison, to_pil
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep
from ..sweep.allocation import allocate, check_limits, stored_bits
from ..sweep.store import FolderStore, Store, layer_arrays, module_facts
from ..sweep.streams import CalibrationData
from ..sweep.sweep import check_model, sweep

KIND = "quantized-model"
SAVED = ("kind", "version", "model", "layers", "attentions", "files", "mlxquant", "mlx", "plain")  # what ``save`` adds to the facts


class Model:
    """A model: one that draws pictures from prompts, or one that writes text."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def diffusion(self) -> DiffusionAdapter:
        """The adapter, as one that draws; raises AdapterError where the model writes text."""
        return diffusion(self.adapter)

    @property
    def language(self) -> LanguageAdapter:
        """The adapter, as one that writes text; raises AdapterError where the model draws pictures."""
        return language(self.adapter)

    def predict(self, text: str, length: int | None = None, limit: int | None = None, progress: Progress = silent) -> Prediction:
        """How well a language model predicts a text; see ``prediction.predict``. Windows are by default as long as calibration has them."""
        adapter = self.language
        windows = adapter.context if length is None else length
        return predict(adapter.logits, adapter.tokenizer, text, windows, limit, adapter.batch, progress)

    def images(
        self,
        prompts: Sequence[Prompt],
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
        progress: Progress = silent,
        at_once: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Pictures [B,H,W,3] in [0,1], each from its prompt and seed, ``at_once`` together, by default as the adapter has it."""
        if not prompts:
            raise CalibrationError("there are no prompts to draw")
        adapter = self.diffusion
        adapter.prepare(prompts)
        at_once, parts = adapter.batch if at_once is None else at_once, []
        for start in progress(range(0, len(prompts), at_once), "sampling"):
            some = prompts[start : start + at_once]
            latent = adapter.generate([p.text for p in some], [p.seed for p in some], steps, cfg, callback)
            parts.append(adapter.decode(latent))
        images = np.concatenate(parts)
        if not np.isfinite(images).all():
            raise NumericsError(f"{self.name}: a picture holds NaN or infinite values; the model's weights are damaged or overflow")
        return images

    def generate(self, prompt: str, seed: int = 0, steps: int | None = None, cfg: float | None = None) -> Image.Image:
        """One picture for one prompt."""
        return to_pil(self.images([Prompt(seed, prompt)], steps, cfg)[0])

    def clone(self) -> Adapter:
        """An adapter with the same weights (shared, not copied) that can be rewritten without touching this one."""
        other = self.adapter.twin()
        for path, layer in find_quantized(self.adapter.module).items():
            set_module(other.module, path, QuantizedLinear.blank(layer.facts, other.clock))
        for path, attention in find_quantized_attentions(self.adapter.module).items():
            set_module(other.module, path, QuantizedAttention.blank(attention.facts, other.clock))
        other.module.load_weights(list(parameters(self.adapter.module).items()))
        _refresh(other.module)
        return other


def _refresh(module: nn.Module) -> None:
    """Let everything quantized in a module know that its parameters were loaded."""
    for part in (*find_quantized(module).values(), *find_quantized_attentions(module).values()):
        part.refresh()


class QuantizedModel(Model):
    """A model whose layers run quantized, with the facts of how that came about."""

    def __init__(self, adapter: Adapter, facts: dict[str, Any]):
        super().__init__(adapter)
        self.facts = facts

    @classmethod
    def load(cls, folder: str | Path) -> QuantizedModel:
        """A folder that ``save`` wrote; raises ArtifactError when it is damaged or foreign."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such folder; expected a folder written by 'mlxquant quantize'")
        if not (folder / "model.json").exists():
            raise ArtifactError(f"{folder}: holds no model.json; expected a folder written by 'mlxquant quantize'")
        try:
            return _load_folder(folder, artifacts.read_json(folder / "model.json", KIND))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{folder / 'model.json'}: incomplete or foreign ({error!r}); quantize again") from error

    @property
    def layers(self) -> dict[str, QuantizedLinear]:
        return find_quantized(self.adapter.module)

    @property
    def size(self) -> Size:
        return Size.of(self.layers, self._arrays())

    def _arrays(self) -> dict[str, mx.array]:
        """Everything that is stored: quantized layers as they run, other parameters as float16 where that loses nothing."""
        quantized = layer_arrays(self.layers) | layer_arrays(find_quantized_attentions(self.adapter.module))
        everything = parameters(self.adapter.module)
        return {name: value if name in quantized else artifacts.compact(value) for name, value in everything.items()}

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the model as a folder that ``load`` reads; equal models give equal bytes. Raises ArtifactError, leaving nothing behind."""
        with artifacts.atomic_folder(Path(folder), force) as temporary:
            weights = temporary / "weights.safetensors"
            artifacts.write_tensors(weights, "weights", self._arrays(), {"model": self.name})
            facts = {
                **self.facts,
                "model": {
                    "name": self.name,
                    **self.adapter.describe(),
                    "place": self.adapter.save_beside(temporary),
                },
                "layers": module_facts(self.layers),
                "attentions": module_facts(find_quantized_attentions(self.adapter.module)),
                "files": {weights.name: artifacts.file_digest(weights)},
                **versions(),
            }
            artifacts.write_json(temporary / "model.json", KIND, facts)
        return Path(folder)


def load(reference: str | Path, size: int | None = None) -> Model:
    """A model with its full-precision weights by name, hub id or folder, or a folder that ``QuantizedModel.save`` wrote.

    ``size`` is the pictures' side in pixels, for models that draw several. Raises AdapterError on an unknown name or an impossible
    size, ArtifactError on a damaged or foreign folder.
    """
    folder = Path(reference)
    model = QuantizedModel.load(folder) if (folder / "model.json").exists() else Model(pretrained(str(reference)))
    if size is not None:
        model.diffusion.resize(size)
    return model


def _load_folder(folder: Path, facts: dict[str, Any]) -> QuantizedModel:
    arrays: dict[str, mx.array] = {}
    for name, sha256 in facts["files"].items():
        arrays |= artifacts.read_tensors(folder / name, "weights", str(sha256))[0]
    arrays = restored(arrays, facts["layers"], facts.get("plain", ()))
    adapter: Adapter = adapter_class(facts["model"]["name"]).blank(facts["model"])
    adapter.place = artifacts.absolute_place(facts["model"].get("place", ""), folder)
    for path, structure in facts["layers"].items():
        set_module(adapter.module, path, QuantizedLinear.blank(structure, adapter.clock))
    for path, structure in facts.get("attentions", {}).items():
        set_module(adapter.module, path, QuantizedAttention.blank(structure, adapter.clock))
    artifacts.load_parameters(adapter.module, arrays, str(folder))
    _refresh(adapter.module)
    return QuantizedModel(adapter, {k: v for k, v in facts.items() if k not in SAVED})


def calibrate(
    model: Model,
    prompts: int | Sequence[Prompt] = 16,
    steps: int | None = None,
    cfg: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
    samples: int | None = None,
    work: str | Path | None = None,
) -> Calibration:
    """Collect trajectories for ``quantize``. With ``work``, a folder, a killed run resumes there.

    ``prompts`` is a number, to take that many of the model's own calibration prompts with their seeds shifted by ``seed``, or a list.
    ``samples`` limits how many pairs of a picture and a sampler step go through the layers when they are quantized: all steps, the
    pictures in turn. By default that is the model's own limit; mmdit-shapes has none.
    """
    adapter = model.diffusion
    some = adapter.prompts("calibration", prompts, seed) if isinstance(prompts, int) else list(prompts)
    steps, cfg = adapter.steps if steps is None else steps, adapter.cfg if cfg is None else cfg
    path = None if work is None else Path(work) / "calibration.safetensors"
    if path is not None:
        artifacts.ensure_writable(path.parent)
    return trajectories.collect(adapter, some, steps, cfg, progress, adapter.samples if samples is None else samples, path)


def calibrate_text(
    model: Model, data: str | Path | None = None, samples: int | None = None, length: int | None = None, seed: int = 0
) -> TextCalibration:
    """Text for ``quantize`` of a language model: ``samples`` windows of ``length`` tokens, by default as the model has them, from a text
    file, or from the sources of Python's standard library. A part of either is left for ``Model.predict``; see ``corpus.read_corpus``.
    """
    return collect_text(model.language, read_corpus(None if data is None else Path(data)), samples, length, seed)


def plan(model: Model, recipe: Recipe) -> dict[str, LayerSpec]:
    """What the recipe would do to each layer; raises RecipeError where it does not fit the model."""
    if isinstance(model, QuantizedModel):
        raise RecipeError(f"{model.name} is quantized already, by {model.facts['recipe']['name']}; quantize the full-precision model")
    check_model(model.adapter, recipe)
    linears = model.adapter.linears()
    layers = recipe.plan({path: model.adapter.role(path) for path in linears})
    for path, spec in layers.items():
        try:
            spec.weight.columns(linears[path].weight.shape[1])
        except RecipeError as error:
            raise RecipeError(f"recipe {recipe.name}, layer {path}: {error}") from error
    check_limits(model.adapter, recipe, layers, recipe.bits_per_weight, recipe.bits_per_activation)
    return layers


def quantize(
    model: Model,
    calib: CalibrationData,
    recipe: str | Recipe,
    work: str | Path | None = None,
    progress: Progress = silent,
    tracks: TrackFiles | None = None,
) -> QuantizedModel:
    """Quantize a copy of ``model``; the model itself stays as it is. With ``work``, a folder, a killed run resumes there.

    Where the recipe limits the average bits, each layer first gets its own (``allocation``); where it has several rounds, each after
    the first calibrates on what the model quantized so far draws from the same prompts. ``tracks`` are files of the explicit pipeline whose
    blocks are taken as they are; the recipe then decides on the other layers.
    Raises RecipeError, CalibrationError or NumericsError before anything long starts where that can be known.
    """
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    layers = plan(model, recipe)
    model.adapter.check_finite()
    if (calib.model, calib.source) != (model.name, model.adapter.fingerprint):
        raise CalibrationError(
            f"the calibration data is of other weights ({calib.model}) than the model's ({model.name}); calibrate this model"
        )
    facts: dict[str, Any] = {}
    if recipe.allocates:
        limit = stored_bits(model.adapter, layers) if recipe.mixed and recipe.bits_per_weight is None else recipe.bits_per_weight
        place = None if work is None else Path(work)
        given = allocate(model.adapter, calib, recipe, limit, recipe.bits_per_activation, progress=progress, work=place)
        recipe, facts["allocation"] = given.recipe, given.facts
    drawn: CalibrationData = calib
    done: QuantizedModel | None = None
    for turn in range(recipe.rounds):
        folder = None if work is None else Path(work) / f"round-{turn + 1}" if recipe.rounds > 1 else Path(work)
        if done is not None:
            path = None
            if folder is not None:
                artifacts.ensure_writable(folder)
                path = folder / "calibration.safetensors"
            drawn = calib.renewed(done.adapter, progress, path)
        done = _quantize_once(model, drawn, recipe, layers, facts, folder, progress, tracks)
    assert done is not None
    return done


def _quantize_once(
    model: Model,
    calib: CalibrationData,
    recipe: Recipe,
    layers: Mapping[str, LayerSpec],
    facts: Mapping[str, Any],
    work: Path | None,
    progress: Progress,
    tracks: TrackFiles | None,
) -> QuantizedModel:
    """One round of ``quantize``; ``facts`` are added to those of the result."""
    adapter = model.clone()
    made = {**facts, "recipe": recipe.to_dict(), "calibration": calib.record}
    store: Store | None = None
    if tracks is not None:
        made["tracks"] = tracks.digests
        store = tracks.store(adapter, layers)
    elif work is not None:
        store = FolderStore(work, artifacts.digest(made | versions()))
    stages = sweep(adapter, calib, recipe, store, progress, work)
    return QuantizedModel(adapter, {**made, "stages": stages})


def compare(
    reference: Model,
    others: Model | Mapping[str, Model],
    prompts: str | Sequence[Prompt],
    seed: int = 0,
    steps: int | None = None,
    cfg: float | None = None,
    progress: Progress = silent,
) -> Comparison:
    """The same prompts and seeds from the reference and from others, side by side, with the differences measured."""
    some = [Prompt(seed, prompts)] if isinstance(prompts, str) else list(prompts)
    named = {"quantized": others} if isinstance(others, Model) else dict(others)
    for name, model in named.items():
        if model.diffusion.latent_shape != reference.diffusion.latent_shape:
            raise AdapterError(
                f"{name} draws latents of {model.diffusion.latent_shape}, {reference.name} of {reference.diffusion.latent_shape}; load "
                "both with the same size"
            )
    first = "reference" if isinstance(reference, QuantizedModel) or "FP" in named else "FP"
    images = {name: m.images(some, steps, cfg, progress=progress) for name, m in {first: reference, **named}.items()}
    return Comparison.of(some, images, reference.diffusion.attributes)
