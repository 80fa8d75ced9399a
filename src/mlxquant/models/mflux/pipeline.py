"""A pipeline of mflux as the toolkit holds it: loaded by mflux, checked, and asked for pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import AdapterError, ArtifactError, MlxQuantError, reason
from ...grids.keeping_time import keeps_time
from ...layers.tree import parameters, require_finite
from ...progress import Progress, silent
from ...sampling.picture_size import PictureSize
from ...sampling.prompts import Prompt, packaged_prompts
from ..recorded.watching import uncompiled
from .components import Component, components_of, spine
from .float8 import find_float8
from .names import MfluxName, from_mflux
from .saved import check_saved

CONFIG = "models.common.config.model_config.ModelConfig"
OPTIONS = {  # what ``draw`` is told, as mflux's pipelines call it
    "steps": "num_inference_steps",
    "guidance": "guidance",
    "width": "width",
    "height": "height",
    "negative": "negative_prompt",
}
ALWAYS = {  # for calls that are whole: what they read of a prompt, pipelines keep for the next step if they may
    "use_kv_cache": False,
    "warn_on_caption_issues": False,
}
PACKS = "use_packed_projections"  # of a transformer that reads weights of several layers at once, past the layers
CAPTIONS = ("fibo", "fibo-lite")  # read no sentence but JSON
log = logging.getLogger(__name__)


class MfluxPipeline:
    """One of mflux's pipelines.

    Args:
        pipeline: The object of mflux.
        name: Which model it is.
        loras: Paths of LoRA files that are baked into its transformer, each with its scale.

    Attributes:
        dtypes: By component, those of its parameters as mflux loaded them.
        float8: Components with weights in 8-bit floats.
    """

    def __init__(self, pipeline: Any, name: MfluxName, loras: Sequence[tuple[str, float]] = ()):
        self.pipeline, self.name, self.loras = pipeline, name, tuple(loras)
        self.dtypes = {
            one.name: {path: value.dtype for path, value in parameters(one.module).items()} for one in self.components
        }
        self.float8 = frozenset(one.name for one in self.components if find_float8(one.module))
        for one in self.components:
            if hasattr(one.module, PACKS):
                setattr(one.module, PACKS, False)

    @classmethod
    def load(cls, reference: str, loras: Sequence[tuple[str, float]] = (), quantized: bool = False) -> MfluxPipeline:
        """A pipeline with its weights, loaded by mflux from the hub's cache, the hub or a folder.

        Weights are read when they are first needed. On a CPU all of it is float32, for which alone it has a fast
        product.

        Args:
            reference: ``mflux:NAME[@PLACE]``, or a folder that 'mflux-save' wrote; see ``MfluxName``.
            loras: Paths of LoRA files, each with its scale, as mflux takes them.
            quantized: Whether weights may be quantized, which is enough for drawing.

        Raises:
            AdapterError: There is no such model, it takes no LoRA files, or mflux is not installed.
            ArtifactError: Weights are missing, damaged or another model's; or the hub refuses them; or they are
                quantized already.
        """
        name = MfluxName.of(reference)
        kind = from_mflux("models.common.cli.save.MODEL_CLASSES")[name.key]
        accepted = signature(kind).parameters
        if loras and "lora_paths" not in accepted:
            raise AdapterError(f"{name}: mflux has no LoRA files for this model; leave them out")
        options: dict[str, Any] = {"quantize": None, "model_config": _config(name), "model_path": name.place or None}
        if loras:
            options |= {"lora_paths": [path for path, _ in loras], "lora_scales": [scale for _, scale in loras]}
            options |= {"bake_lora": True} if "bake_lora" in accepted else {}
        with precision(), _explained(name):
            made = kind(**options)
        pipeline = cls(made, name, loras)
        if made.bits is not None and not quantized:
            raise ArtifactError(
                f"{name}: its weights are quantized already, to {made.bits} bits; pass full-precision ones"
            )
        if name.place and Path(name.place).is_dir():
            check_saved(Path(name.place), pipeline.components, str(name))
        if mx.default_device() == mx.cpu:
            for component in pipeline.components:
                component.module.set_dtype(mx.float32)
        return pipeline

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """What it is made of, in the order in which mflux saves it."""
        return components_of(self.pipeline)

    @property
    def dtype(self) -> mx.Dtype:
        """In which it computes here."""
        with precision():
            found: mx.Dtype = from_mflux(CONFIG).precision
        return found

    @property
    def steps(self) -> int:
        """How many steps mflux takes where nobody says."""
        known = from_mflux("cli.defaults.defaults.MODEL_INFERENCE_STEPS")
        return int(known.get(self.name.key, from_mflux("cli.defaults.defaults.DEFAULT_INFERENCE_STEPS")))

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        """Prompts of our own, as ``DiffusionAdapter.prompts`` has them."""
        return packaged_prompts(str(self.name), purpose, count, seed)

    def draw(
        self,
        prompts: Sequence[Prompt],
        steps: int | None = None,
        cfg: float | None = None,
        size: PictureSize | None = None,
        negative: str | None = None,
        progress: Progress = silent,
    ) -> npt.NDArray[np.float32]:
        """Draw pictures, one after the other.

        Args:
            prompts: Prompts with their seeds, at least one.
            steps: Sampler steps; None for mflux's own number.
            cfg: Weight of guidance; None for the pipeline's own.
            size: Width and height in pixels; None for the pipeline's own.
            negative: The negative prompt; None for none.
            progress: Wraps the prompts.

        Returns:
            Pictures [B,height,width,3] float32 in [0,1].

        Raises:
            AdapterError: The pipeline does not take one of these.
            NumericsError: A picture is not finite.
        """
        width, height = size or (None, None)
        asked = {"steps": steps or self.steps, "guidance": cfg, "width": width, "height": height, "negative": negative}
        options = self._options({name: value for name, value in asked.items() if value is not None})
        timed = any(keeps_time(part) for component in self.components for _, part in spine(component.module))
        pictures = []
        for prompt in progress(list(prompts), "drawing"):
            with precision(), _explained(self.name), uncompiled() if timed else nullcontext():
                drawn = self.pipeline.generate_image(seed=prompt.seed, prompt=self._said(prompt.text), **options)
            pictures.append(np.asarray(drawn.image.convert("RGB"), np.float32) / 255)
        return np.stack(pictures)

    def _said(self, text: str) -> str:
        """A prompt as this pipeline reads it. Where that is a caption in JSON, a sentence is its description."""
        if self.name.key not in CAPTIONS:
            return text
        try:
            json.loads(text)
        except ValueError:
            return json.dumps({"short_description": text}, ensure_ascii=False)
        return text

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What was asked for, as this pipeline calls it."""
        takes = signature(self.pipeline.generate_image).parameters
        refused = [name for name in asked if OPTIONS[name] not in takes]
        if refused:
            raise AdapterError(f"{self.name}: its pipeline in mflux takes no {refused[0]}; leave it out")
        always = {name: value for name, value in ALWAYS.items() if name in takes}
        return {OPTIONS[name]: value for name, value in asked.items()} | always

    def forget_texts(self) -> None:
        """Let texts be encoded anew: mflux keeps what it has encoded, and so would what is quantized since."""
        for name in ("prompt_cache", "_prompt_cache"):
            if (cache := getattr(self.pipeline, name, None)) is not None:
                cache.clear()

    def check_finite(self) -> None:
        """Raise NumericsError, naming the tensor, when a weight holds NaN or infinity."""
        for component in self.components:
            require_finite(component.module, f"{self.name}, {component.name}")


@contextmanager
def precision() -> Iterator[None]:
    """mflux computes in bfloat16, for which MLX's CPU has no fast product; there it computes in float32 inside."""
    if mx.default_device() != mx.cpu:
        yield
        return
    config = from_mflux(CONFIG)
    before, config.precision = config.precision, mx.float32
    try:
        yield
    finally:
        config.precision = before


def _config(name: MfluxName) -> Any:
    """What mflux knows of a model: of its own, or as much for weights from another place."""
    if not name.place:
        return from_mflux("models.common.config.model_config.AVAILABLE_MODELS")[name.key]
    return from_mflux(CONFIG).from_name(name.place, base_model=name.key)


@contextmanager
def _explained(name: MfluxName) -> Iterator[None]:
    """What mflux and the hub raise inside, as one of our errors."""
    try:
        yield
    except MlxQuantError:
        raise
    except Exception as error:  # mflux's, the hub's, transformers' and MLX's errors have no base in common
        said = reason(error)
        if type(error).__name__ == "GatedRepoError" or "gated" in said.lower():
            then = "accept its licence on the hub, and set HF_TOKEN"
        elif "Offline" in type(error).__name__ or "LocalEntryNotFound" in type(error).__name__:
            then = "download it on a connected machine, or pass a folder: mflux:NAME@FOLDER"
        else:
            then = "pass a folder with all of its files in the layout of the hub or of mflux-save: mflux:NAME@FOLDER"
        raise ArtifactError(f"{name}: mflux stopped with {said}; {then}") from error
