"""What a model costs to run: seconds a sampler step, and memory.

Models take turns, so that a machine that is busy for a while slows all of them: the ratio to the first is over pairs of
neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from ..api.model import Model, QuantizedModel
from ..files.parameters import compact
from ..layers.sizes import Size
from ..layers.tree import parameters
from ..progress import Progress
from ..sampling.guidance import Guidance
from ..sampling.prompts import Prompt
from ..sampling.sampler import SamplerStep

ROUNDS, STEPS = 8, 4  # of the sampler, in each round
MEASURED = ("latency_s", "latency_p95_s", "latency_ratio", "peak_bytes")


def measure_costs(
    models: Sequence[Model], prompt: Prompt, guidance: Guidance, progress: Progress
) -> list[dict[str, float]]:
    """For each model ``latency_s`` and ``latency_p95_s``: median and 95th percentile seconds of one sampler step of one
    picture, both sides of its guidance, after a round to warm up; ``latency_ratio``: the median over rounds of its
    median to the first model's; and ``peak_bytes``: see ``peak``.
    """
    peaks = [peak(model, prompt, guidance) for model in models]
    seconds = np.empty((ROUNDS, len(models), STEPS - 1))
    for turn in progress(range(ROUNDS), "latency"):
        for index in np.roll(range(len(models)), turn).tolist():
            seconds[turn, index] = step_seconds(models[index], prompt, guidance)
    medians = np.median(seconds, axis=2)
    return [
        {
            "latency_s": float(np.median(seconds[:, index])),
            "latency_p95_s": float(np.percentile(seconds[:, index], 95)),
            "latency_ratio": float(np.median(medians[:, index] / medians[:, 0])),
            "peak_bytes": bytes_,
        }
        for index, bytes_ in enumerate(peaks)
    ]


def step_seconds(model: Model, prompt: Prompt, guidance: Guidance) -> list[float]:
    """Seconds [STEPS - 1] from one sampler step to the next."""
    times: list[float] = []

    def stamp(step: SamplerStep) -> None:
        mx.eval(step.velocity)
        times.append(time.perf_counter())

    model.diffusion.generate([prompt.text], [prompt.seed], STEPS, guidance.weight, stamp, guidance.negative)
    return list(np.diff(times))


def peak(model: Model, prompt: Prompt, guidance: Guidance) -> int:
    """Bytes of the model's own weights, as they are held, and of the most that MLX held beside them while it sampled
    one picture.

    Other models in this process do not count, nor do text encoders, the decoder, and Python itself.
    """
    model.diffusion.prepare([prompt], guidance.negative)
    held = parameters(model.adapter.module)
    mx.eval(held)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step_seconds(model, prompt, guidance)
    return sum(value.nbytes for value in held.values()) + max(0, mx.get_peak_memory() - before)


def sizes(model: Model) -> dict[str, Any]:
    """``model_bytes``, ``bits_per_weight`` and ``bits_per_quantized_weight`` (None in full precision), as
    ``QuantizedModel.size`` has them: other parameters count as float16 where that loses nothing.
    """
    if isinstance(model, QuantizedModel):
        return asdict(model.size)
    everything = parameters(model.adapter.module)
    return asdict(Size.of({}, {name: compact(value) for name, value in everything.items()}))
