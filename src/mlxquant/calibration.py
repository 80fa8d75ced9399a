"""Calibration data: what the model sees on its own trajectories, real prompts and real noise, at every sampler step.

Only latents are kept; text is encoded again when it is needed. Everything is a function of (model, prompts, steps, cfg).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from . import artifacts
from .errors import CalibrationError
from .models.adapter import Adapter, State
from .progress import Progress, silent
from .prompts import Prompt
from .sampler import SamplerStep


@dataclass(frozen=True)
class Calibration:
    """``latents`` [steps, prompts, H, W, C] float32 before each Euler step, at ``sigmas`` [steps].

    ``source`` is the fingerprint of the weights that drew them.
    """

    model: str
    source: str
    prompts: tuple[Prompt, ...]
    steps: int
    cfg: float
    sigmas: npt.NDArray[np.float64]
    latents: mx.array

    @property
    def facts(self) -> dict[str, Any]:
        """What this data was made from, as plain data."""
        return facts(self.model, self.source, self.prompts, self.steps, self.cfg)

    def batches(self, adapter: Adapter, size: int = 16) -> tuple[list[float], list[State]]:
        """Noise levels and chain inputs, each batch at one noise level with at most ``size`` prompts.

        Guided models see every latent with its prompt and with the empty prompt, as their sampler does.
        """
        texts = [p.text if self.cfg != 0 else "" for p in self.prompts]
        text = adapter.encode(texts)
        empty = adapter.encode([""] * len(texts)) if self.cfg not in (0, 1) else None
        sigmas, states = [], []
        for index, sigma in enumerate(self.sigmas):
            for start in range(0, len(texts), size):
                rows = slice(start, start + size)
                latent, conditioning = self.latents[index, rows], text.take(rows)
                if empty is not None:
                    latent, conditioning = mx.concatenate([latent, latent]), conditioning.joined(empty.take(rows))
                sigmas.append(float(sigma))
                states.append(adapter.state(latent, conditioning.tokens, conditioning.pooled, float(sigma)))
        mx.eval(states)
        return sigmas, states

    def in_order(self, adapter: Adapter) -> tuple[list[float], list[State]]:
        """As ``batches``, all prompts at once, with the rows prompt by prompt: a prompt's guided and unguided side follow each other."""
        sigmas, states = self.batches(adapter, len(self.prompts))
        rows = mx.arange(len(states[0]["t"])).reshape(-1, len(self.prompts)).T.flatten()
        return sigmas, [{key: value[rows] for key, value in state.items()} for state in states]

    def save(self, path: Path) -> None:
        artifacts.write_tensors(path, "calibration", {"latents": self.latents}, {**self.facts, "sigmas": self.sigmas.tolist()})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises ArtifactError when the file is damaged or foreign."""
        arrays, header = artifacts.read_tensors(path, "calibration")
        prompts = tuple(Prompt(seed, text) for seed, text in header["prompts"])
        return cls(
            header["model"], header["source"], prompts, header["steps"], header["cfg"], np.array(header["sigmas"]), arrays["latents"]
        )


def facts(model: str, source: str, prompts: Sequence[Prompt], steps: int, cfg: float) -> dict[str, Any]:
    """What determines calibration data."""
    return {"model": model, "source": source, "prompts": [[p.seed, p.text] for p in prompts], "steps": steps, "cfg": cfg}


def collect(
    adapter: Adapter,
    prompts: Sequence[Prompt],
    steps: int,
    cfg: float,
    progress: Progress = silent,
    size: int = 16,
) -> Calibration:
    """Run the full-precision sampler over prompts and keep every latent; raises CalibrationError without prompts."""
    if not prompts:
        raise CalibrationError("calibration needs at least one prompt")
    adapter.check_finite()
    parts: list[list[mx.array]] = []
    for start in progress(range(0, len(prompts), size), "calibration"):
        some = prompts[start : start + size]
        seen: list[mx.array] = []

        def keep(step: SamplerStep, seen: list[mx.array] = seen) -> None:
            seen.append(step.latent)

        adapter.generate([p.text for p in some], [p.seed for p in some], steps, cfg, keep)
        parts.append(seen)
    latents = mx.stack([mx.concatenate([part[i] for part in parts]) for i in range(steps)])
    mx.eval(latents)
    return Calibration(adapter.name, adapter.fingerprint, tuple(prompts), steps, cfg, adapter.sigmas(steps)[:-1], latents)
