"""Models as a notebook holds them: loaded, drawn with, saved; full-precision or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ArtifactError, CalibrationError, NumericsError
from ..files.atomic import absolute_place, atomic_folder
from ..files.checked import (
    file_digest,
    read_json,
    read_tensors,
    understood,
    versions,
    write_json,
    write_tensors,
)
from ..files.parameters import compact, load_parameters
from ..layers.attention import QuantizedAttention, find_quantized_attentions
from ..layers.kinds import blanks, find_layers, layer_facts, rebuilt, refresh
from ..layers.plain import restored
from ..layers.product import QuantizedProduct
from ..layers.sizes import Size
from ..layers.tree import parameters, set_module
from ..metrics.prediction import Prediction, predict
from ..models.adapter import Adapter
from ..models.catalog import adapter_class
from ..models.diffusion import DiffusionAdapter, diffusion
from ..models.language import LanguageAdapter, language
from ..progress import Progress, silent
from ..report.comparison import to_pil
from ..sampling.batches import drawn_batches
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep
from ..sweep.store import layer_arrays, module_facts
from .structure import STRUCTURE

KIND = "quantized-model"
# what ``save`` adds to the facts
SAVED = ("kind", "version", "model", "layers", "attentions", "files", "mlxquant", "mlx", "plain")


class Model:
    """A model: one that draws pictures from prompts, or one that writes text.

    Args:
        adapter: What tells the toolkit about the model: its module, its stages, and how it is sampled.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    @property
    def name(self) -> str:
        """What the model is called, such as ``"mmdit-shapes"``."""
        return self.adapter.name

    @property
    def module(self) -> nn.Module:
        """The module of MLX that holds the layers; what is done to it is done to this model."""
        return self.adapter.module

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
        """How well a language model predicts a text.

        Args:
            text: The text; it is cut into windows that do not overlap.
            length: Tokens of a window; None for as many as calibration takes.
            limit: Windows at most, evenly spread over the text; None for all.
            progress: Wraps the batches of windows.

        Returns:
            The perplexity, the bits per character, and how much text they are of.

        Raises:
            AdapterError: When the model draws pictures, or a window is longer than it can see.
            CalibrationError: When the text is too short for one window.
            NumericsError: When a prediction is not finite.
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
        negative: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Draw pictures, each from its prompt and its seed.

        Args:
            prompts: Prompts with their seeds, at least one.
            steps: Sampler steps; None for the model's own number.
            cfg: Weight of classifier-free guidance, 0 or more; None for the model's own.
            callback: Called before each sampler step of each batch, with the latents there and their velocity.
            progress: Wraps the batches.
            at_once: How many are drawn together; None for the model's own number.
            negative: The negative prompt, which guidance leads away from; None for none.

        Returns:
            Pictures [B,H,W,3] float32 in [0,1], in the order of the prompts.

        Raises:
            AdapterError: When the model writes text, does not know a prompt, or ``steps``, ``cfg`` or ``negative`` is
                impossible.
            CalibrationError: Without prompts.
            NumericsError: When a picture is not finite.
        """
        if not prompts:
            raise CalibrationError("there are no prompts to draw")
        self.diffusion.guiding(cfg, negative)  # refused now, if at all, and not after text encoders have run
        batches = drawn_batches(
            self.diffusion, prompts, steps, cfg, progress, size=at_once, callback=callback, negative=negative
        )
        return np.concatenate([self.decoded(batch.final) for batch in batches])

    def decoded(self, latents: mx.array) -> npt.NDArray[np.float32]:
        """Decode latents.

        Args:
            latents: [B,H,W,C], as the sampler ends with them.

        Returns:
            Pictures [B,height,width,3] float32 in [0,1].

        Raises:
            NumericsError: When a picture is not finite.
        """
        images = self.diffusion.decode(latents)
        if not np.isfinite(images).all():
            raise NumericsError(
                f"{self.name}: a picture holds NaN or infinite values; the model's weights are damaged or overflow"
            )
        return images

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        cfg: float | None = None,
        negative: str | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
    ) -> Image.Image:
        """Draw one picture for one prompt.

        Args:
            prompt: What to draw.
            seed: Of the noise that the picture starts from.
            steps: Sampler steps; None for the model's own number.
            cfg: Weight of guidance; None for the model's own.
            negative: The negative prompt, which guidance leads away from; None for none.
            image: What the picture is drawn from, scaled to the model's size; None for noise alone.
            strength: How much of it is drawn anew, in (0,1]: the share of the steps that are taken.

        Returns:
            The picture, as Pillow has it.

        Raises:
            AdapterError: When the model writes text, does not know the prompt, cannot draw from a picture, or
                ``steps``, ``cfg``, ``negative`` or ``strength`` is impossible.
            NumericsError: When the picture is not finite.
        """
        if image is None:
            return to_pil(self.images([Prompt(seed, prompt)], steps, cfg, negative=negative)[0])
        scaled = image.convert("RGB").resize(self.diffusion.size, Image.Resampling.LANCZOS)
        start = self.diffusion.latents(np.asarray(scaled, np.float32)[None] / np.float32(255))
        drawn = self.diffusion.generate([prompt], [seed], steps, cfg, None, negative, start, strength)
        return to_pil(self.decoded(drawn)[0])

    def clone(self) -> Adapter:
        """An adapter that can be rewritten without touching this model.

        Returns:
            The adapter; its weights are those of this model, shared and not copied.

        Raises:
            AdapterError: When the model was trained or rotated for quantization already.
        """
        other = self.adapter.twin()
        for path, part in blanks(self.adapter.module, other.clock).items():
            set_module(other.module, path, part)
        other.module.load_weights(list(parameters(self.adapter.module).items()))
        refresh(other.module)
        return other


class QuantizedModel(Model):
    """A model whose layers run quantized; ``quantize`` and ``load`` make one.

    Args:
        adapter: The model, with quantized layers in place.
        facts: How that came about, as plain data: the ``recipe``, the ``calibration``, what was kept at each of the
            ``stages``.
    """

    def __init__(self, adapter: Adapter, facts: dict[str, Any]):
        super().__init__(adapter)
        self.facts = facts

    @classmethod
    def load(cls, folder: str | Path) -> QuantizedModel:
        """Load what ``save`` wrote.

        Args:
            folder: The folder.

        Returns:
            The model, bit for bit as it was.

        Raises:
            ArtifactError: When the folder is missing, damaged, or not one of ours.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such folder; expected a folder written by 'mlxquant quantize'")
        if not (folder / "model.json").exists():
            raise ArtifactError(f"{folder}: holds no model.json; expected a folder written by 'mlxquant quantize'")
        facts = read_json(folder / "model.json", KIND, STRUCTURE, "quantize again")
        with understood(folder / "model.json", "quantize again"):
            return _load_folder(folder, facts)

    @property
    def layers(self) -> dict[str, QuantizedProduct]:
        """The quantized layers of every kind, by their paths in the module."""
        return find_layers(self.adapter.module)

    @property
    def size(self) -> Size:
        """Bytes and bits per weight of all that ``save`` stores."""
        return Size.of(self.layers, self._arrays())

    def _arrays(self) -> dict[str, mx.array]:
        """Everything that is stored: quantized layers as they run, other parameters as float16 where that loses
        nothing.
        """
        quantized = layer_arrays(self.layers) | layer_arrays(find_quantized_attentions(self.adapter.module))
        everything = parameters(self.adapter.module)
        return {name: value if name in quantized else compact(value) for name, value in everything.items()}

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the model as a folder that ``load`` reads; equal models give equal bytes.

        Args:
            folder: Where to; it is written whole or not at all.
            force: Replace a folder that mlxquant wrote, in the last moment.

        Returns:
            The folder.

        Raises:
            ArtifactError: When the folder exists and may not be replaced, or cannot be written; nothing is left behind.
        """
        with atomic_folder(Path(folder), force) as temporary:
            weights = temporary / "weights.safetensors"
            write_tensors(weights, "weights", self._arrays(), {"model": self.name})
            facts = {
                **self.facts,
                "model": {"name": self.name, **self.adapter.describe(), "place": self.adapter.save_beside(temporary)},
                "layers": layer_facts(self.layers),
                "attentions": module_facts(find_quantized_attentions(self.adapter.module)),
                "files": {weights.name: file_digest(weights)},
                **versions(),
            }
            write_json(temporary / "model.json", KIND, facts)
        return Path(folder)


def _load_folder(folder: Path, facts: dict[str, Any]) -> QuantizedModel:
    arrays: dict[str, mx.array] = {}
    for name, sha256 in facts["files"].items():
        arrays |= read_tensors(folder / name, "weights", str(sha256))[0]
    arrays = restored(arrays, facts["layers"], facts.get("plain", ()))
    adapter: Adapter = adapter_class(facts["model"]["name"]).described(facts["model"])
    adapter.place = absolute_place(facts["model"].get("place", ""), folder)
    for path, layer in facts["layers"].items():
        set_module(adapter.module, path, rebuilt(layer, adapter.clock))
    for path, attention in facts.get("attentions", {}).items():
        set_module(adapter.module, path, QuantizedAttention.blank(attention, adapter.clock))
    load_parameters(adapter.module, arrays, str(folder))
    refresh(adapter.module)
    return QuantizedModel(adapter, {k: v for k, v in facts.items() if k not in SAVED})
