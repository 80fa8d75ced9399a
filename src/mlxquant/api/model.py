"""Models as a notebook holds them: loaded, drawn with, saved; full-precision or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ArtifactError, CalibrationError, NumericsError
from ..files.atomic import absolute_place, atomic_folder
from ..files.checked import file_digest, read_json, read_tensors, versions, write_json, write_tensors
from ..files.parameters import compact, load_parameters
from ..layers.attention import QuantizedAttention, find_quantized_attentions
from ..layers.kinds import blanks, rebuilt, refresh
from ..layers.linear import QuantizedLinear, find_quantized
from ..layers.plain import restored
from ..layers.sizes import Size
from ..layers.tree import parameters, set_module
from ..metrics.prediction import Prediction, predict
from ..models.adapter import Adapter
from ..models.catalog import adapter_class, pretrained
from ..models.diffusion import DiffusionAdapter, diffusion
from ..models.language import LanguageAdapter, language
from ..progress import Progress, silent
from ..report.comparison import to_pil
from ..sampling.batches import drawn_batches
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep
from ..sweep.store import layer_arrays, module_facts

KIND = "quantized-model"
SAVED = (
    "kind",
    "version",
    "model",
    "layers",
    "attentions",
    "files",
    "mlxquant",
    "mlx",
    "plain",
)  # what ``save`` adds to the facts


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

    def predict(
        self, text: str, length: int | None = None, limit: int | None = None, progress: Progress = silent
    ) -> Prediction:
        """How well a language model predicts a text; see ``prediction.predict``. Windows are by default as long as
        calibration has them.
        """
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
        """Pictures [B,H,W,3] in [0,1], each from its prompt and seed, ``at_once`` together, by default as the adapter
        has it.
        """
        if not prompts:
            raise CalibrationError("there are no prompts to draw")
        batches = drawn_batches(self.diffusion, prompts, steps, cfg, progress, size=at_once, callback=callback)
        return np.concatenate([self.decoded(batch.final) for batch in batches])

    def decoded(self, latents: mx.array) -> npt.NDArray[np.float32]:
        """Pictures [B,height,width,3] in [0,1] of latents [B,H,W,C]; raises NumericsError where one is not finite."""
        images = self.diffusion.decode(latents)
        if not np.isfinite(images).all():
            raise NumericsError(
                f"{self.name}: a picture holds NaN or infinite values; the model's weights are damaged or overflow"
            )
        return images

    def generate(self, prompt: str, seed: int = 0, steps: int | None = None, cfg: float | None = None) -> Image.Image:
        """One picture for one prompt."""
        return to_pil(self.images([Prompt(seed, prompt)], steps, cfg)[0])

    def clone(self) -> Adapter:
        """An adapter with the same weights (shared, not copied) that can be rewritten without touching this one."""
        other = self.adapter.twin()
        for path, part in blanks(self.adapter.module, other.clock).items():
            set_module(other.module, path, part)
        other.module.load_weights(list(parameters(self.adapter.module).items()))
        refresh(other.module)
        return other


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
            return _load_folder(folder, read_json(folder / "model.json", KIND))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{folder / 'model.json'}: incomplete or foreign ({error!r}); quantize again"
            ) from error

    @property
    def layers(self) -> dict[str, QuantizedLinear]:
        return find_quantized(self.adapter.module)

    @property
    def size(self) -> Size:
        return Size.of(self.layers, self._arrays())

    def _arrays(self) -> dict[str, mx.array]:
        """Everything that is stored: quantized layers as they run, other parameters as float16 where that loses
        nothing.
        """
        quantized = layer_arrays(self.layers) | layer_arrays(find_quantized_attentions(self.adapter.module))
        everything = parameters(self.adapter.module)
        return {name: value if name in quantized else compact(value) for name, value in everything.items()}

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the model as a folder that ``load`` reads; equal models give equal bytes. Raises ArtifactError, leaving
        nothing behind.
        """
        with atomic_folder(Path(folder), force) as temporary:
            weights = temporary / "weights.safetensors"
            write_tensors(weights, "weights", self._arrays(), {"model": self.name})
            facts = {
                **self.facts,
                "model": {
                    "name": self.name,
                    **self.adapter.describe(),
                    "place": self.adapter.save_beside(temporary),
                },
                "layers": module_facts(self.layers),
                "attentions": module_facts(find_quantized_attentions(self.adapter.module)),
                "files": {weights.name: file_digest(weights)},
                **versions(),
            }
            write_json(temporary / "model.json", KIND, facts)
        return Path(folder)


def load(reference: str | Path, size: int | None = None) -> Model:
    """A model with its full-precision weights by name, hub id or folder, or a folder that ``QuantizedModel.save``
    wrote.

    ``size`` is the pictures' side in pixels, for models that draw several. Raises AdapterError on an unknown name or an
    impossible size, ArtifactError on a damaged or foreign folder.
    """
    folder = Path(reference)
    model = QuantizedModel.load(folder) if (folder / "model.json").exists() else Model(pretrained(str(reference)))
    if size is not None:
        model.diffusion.resize(size)
    return model


def _load_folder(folder: Path, facts: dict[str, Any]) -> QuantizedModel:
    arrays: dict[str, mx.array] = {}
    for name, sha256 in facts["files"].items():
        arrays |= read_tensors(folder / name, "weights", str(sha256))[0]
    arrays = restored(arrays, facts["layers"], facts.get("plain", ()))
    adapter: Adapter = adapter_class(facts["model"]["name"]).blank(facts["model"])
    adapter.place = absolute_place(facts["model"].get("place", ""), folder)
    for path, structure in facts["layers"].items():
        set_module(adapter.module, path, rebuilt(structure, adapter.clock))
    for path, structure in facts.get("attentions", {}).items():
        set_module(adapter.module, path, QuantizedAttention.blank(structure, adapter.clock))
    load_parameters(adapter.module, arrays, str(folder))
    refresh(adapter.module)
    return QuantizedModel(adapter, {k: v for k, v in facts.items() if k not in SAVED})
