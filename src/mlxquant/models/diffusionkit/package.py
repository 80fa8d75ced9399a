"""DiffusionKit (argmaxinc, 0.5.1), imported when it is needed, with what it does differently from the rest of the world
kept in here.

Its transformer computes all modulations of a sampling run in advance, keyed by timestep, and empties the layers that
made them; a batch has one timestep. ``TimedMMDiT`` is that transformer, of which nothing is emptied any more, which can
be run again and again, and which tells quantized layers the time. ``modulations`` runs its blocks with modulations of
our own, one for each sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import AdapterError
from ...grids.time import Clock
from ...layers.attention import SoftmaxAttention
from ...layers.fast_cpu import gelu
from ...layers.tree import parameters
from ..mmdit.config import MMDiTConfig

NOW = 0.0  # the key under which a block finds the modulations of the running forward pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of coremltools, which DiffusionKit imports and does not use here, and without the log
    handler that it adds to the whole process.
    """
    root, log = logging.getLogger(), logging.getLogger("coremltools")
    level, handlers = log.level, list(root.handlers)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        root.handlers[:] = handlers


@cache
def host() -> SimpleNamespace:
    """DiffusionKit's modules, and ``TimedMMDiT``; raises AdapterError when it is not installed."""
    try:
        with _quiet():
            import diffusionkit.mlx as package
            from diffusionkit.mlx import clip, config, mmdit, model_io, t5, tokenizer, vae
    except ImportError as error:
        raise AdapterError(
            f"this model runs on DiffusionKit, which cannot be imported ({error}); pip install 'mlxquant[diffusionkit]'"
        ) from error

    class TimedMMDiT(mmdit.MMDiT):  # type: ignore[misc]
        """DiffusionKit's MMDiT around ``clock``; see the module's docstring."""

        def __init__(self, configuration: Any, clock: Clock):
            super().__init__(configuration)
            self._clock = clock

        def __call__(
            self, latent_image_embeddings: mx.array, token_level_text_embeddings: mx.array, timestep: mx.array
        ) -> mx.array:
            """As DiffusionKit's; raises AdapterError on a batch that mixes timesteps, of which it would silently use
            the first.
            """
            times = np.unique(np.array(timestep.astype(mx.float32)))
            if len(times) != 1:
                raise AdapterError(
                    f"DiffusionKit runs one timestep at a time, found {times.tolist()}; use the adapter's velocity"
                )
            with self._clock.at(float(times[0]) / 1000):
                return super().__call__(latent_image_embeddings, token_level_text_embeddings, timestep)

        def cache_modulation_params(self, pooled_text_embeddings: mx.array, timesteps: mx.array) -> None:
            """As DiffusionKit's, for a new prompt: what was cached goes, and the layers keep their weights, folds
            included.
            """
            self.clear_modulation_params_cache()
            whole = [(name, value) for name, value in parameters(self).items() if "adaLN_modulation" in name]
            for index, time in enumerate(np.array(timesteps.astype(mx.float32))):
                with self._clock.at(float(time) / 1000):
                    try:
                        super().cache_modulation_params(pooled_text_embeddings, timesteps[index : index + 1])
                    finally:
                        self.pop("to_offload", None)
                        self.load_weights(whole, strict=False)

    modules = {
        "clip": clip,
        "config": config,
        "mmdit": mmdit,
        "model_io": model_io,
        "t5": t5,
        "tokenizer": tokenizer,
        "vae": vae,
    }
    return SimpleNamespace(package=package, TimedMMDiT=TimedMMDiT, **modules)


def build_mmdit(config: MMDiTConfig, clock: Clock, dtype: mx.Dtype) -> Any:
    """DiffusionKit's transformer of these sizes with unspecified weights of ``dtype``; it computes its time features in
    ``dtype``, too.

    Attention and GELU are exact ones that are also fast on the CPU, the attention a module that can be replaced; these
    are attributes of this model alone.
    """
    kit = host()
    same = {
        name: value for name, value in config.to_dict().items() if name != "hidden_size"
    }  # our config has DiffusionKit's names
    sizes = kit.config.MMDiTConfig(
        **same,
        hidden_size_override=config.hidden_size,
        dtype=dtype,
        float16_dtype=dtype,
        low_memory_mode=False,  # passes an argument that current MLX does not have
    )
    model = kit.TimedMMDiT(sizes, clock)
    model.set_dtype(dtype)
    for block in model.multimodal_transformer_blocks:
        block.sdpa = SoftmaxAttention()
        for stream in (block.image_transformer_block, block.text_transformer_block):
            if "mlp" in stream:
                stream.mlp.act_fn = gelu
    return model


@contextmanager
def modulations(layers: Sequence[tuple[Any, mx.array]]) -> Iterator[mx.array]:
    """Run DiffusionKit's layers with these modulations [B,1,1,chunks*D], one a sample; yields the timestep to call them
    with.

    What its own cache holds returns afterwards, also after an exception.
    """
    before = [(layer, getattr(layer, "_modulation_params", None)) for layer, _ in layers]
    try:
        for layer, values in layers:
            layer._modulation_params = {NOW: values}
        yield mx.array(NOW)
    finally:
        for layer, params in before:
            if params is None:
                del layer._modulation_params
            else:
                layer._modulation_params = params
