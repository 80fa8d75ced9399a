"""Where an error hurts the picture: ``python benchmarks/where_errors_matter.py --recipe gptq-w4a16``.

Three looks at a quantized ``mmdit-shapes`` on held-out prompts. ``coherence``: its velocity error along full-precision
trajectories, added up as the sampler does, beside what errors of random and of equal sign would add up to. ``windows``:
PSNR when it is used for a few sampler steps only. ``sensitivity``: the range of what a unit of squared error costs in
mean squared velocity error, over noise levels (averaged over the channels of the last block's image stream) and over
streams. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

from mlxquant.api.model import Model
from mlxquant.calibration.passes import Passes
from mlxquant.commandline.console import progress, result, say
from mlxquant.curvature.sensitivity import measure
from mlxquant.metrics.psnr import psnr
from mlxquant.sampling.guidance import guided
from mlxquant.sampling.prompts import Prompt
from mlxquant.sampling.sampler import SamplerStep, sample, seeded_noise

WINDOW = 4


def decibels(power: float) -> float:
    return float(10 * np.log10(power))


def coherence(model: Model, other: Model, prompts: list[Prompt]) -> dict[str, float]:
    """Mean squared error of the latent in dB, from velocity errors weighed by the step length."""
    adapter, texts, steps = model.adapter, [p.text for p in prompts], list[SamplerStep]()
    adapter.generate(texts, [p.seed for p in prompts], callback=steps.append)
    text, empty, guidance = adapter.encode(texts), adapter.unconditional(len(texts)), adapter.guiding()
    lengths = -np.diff(adapter.sigmas(adapter.steps))
    errors = [
        length
        * np.array(guided(other.adapter.velocity, step.latent, step.sigma, text, empty, guidance) - step.velocity)
        for step, length in zip(progress(steps, "coherence"), lengths, strict=True)
    ]
    stacked = np.array(errors)
    return {
        "random_signs_db": decibels(np.square(stacked).sum(0).mean()),
        "as_it_is_db": decibels(np.square(stacked.sum(0)).mean()),
        "equal_signs_db": decibels(np.square(np.abs(stacked).sum(0)).mean()),
    }


def windows(model: Model, other: Model, prompts: list[Prompt]) -> dict[str, float]:
    """PSNR by the noise levels between which the quantized model runs; full precision everywhere else."""
    adapter = model.adapter
    sigmas = adapter.sigmas(adapter.steps)
    noise = seeded_noise([p.seed for p in prompts], adapter.latent_shape)
    text, empty, guidance = (
        adapter.encode([p.text for p in prompts]),
        adapter.unconditional(len(prompts)),
        adapter.guiding(),
    )

    def draw(first: int, last: int) -> np.ndarray:
        def velocity(latent: mx.array, sigma: float) -> mx.array:
            inside = first <= int(np.abs(sigmas - sigma).argmin()) < last
            predict = (other if inside else model).adapter.velocity
            return guided(predict, latent, sigma, text, empty, guidance)

        return adapter.decode(sample(velocity, noise, adapter.walk(adapter.steps)))

    reference = draw(0, 0)
    starts = range(0, adapter.steps, WINDOW)
    return {
        f"{sigmas[s]:.2f} to {sigmas[min(s + WINDOW, adapter.steps)]:.2f}": float(
            psnr(draw(s, s + WINDOW), reference).mean()
        )
        for s in progress(starts, "windows")
    }


def sensitivity(model: Model, num_prompts: int) -> dict[str, float]:
    """Ratios of the largest cost to the smallest."""
    adapter = model.adapter
    sigmas, states = mq.calibrate(model, num_prompts).batches(adapter)
    found = measure(Passes(adapter, sigmas, progress), adapter.stages, states, [])
    *_, before, last = (stage.name for stage in adapter.blocks)
    image, text = found.stages[last]["image"].mean(1), found.stages[before]["text"].mean()
    channels = found.stages[last]["image"].mean(0)
    low, high = np.percentile(channels, [5, 95])
    return {
        "noise_levels": float(image.max() / image.min()),
        "image_over_text": float(found.stages[before]["image"].mean() / text),
        "channels_p95_over_p5": float(high / low),
    }


@click.command()
@click.option("--recipe", default="gptq-w4a16", show_default=True)
@click.option("--num-prompts", default=16, show_default=True)
def main(recipe: str, num_prompts: int) -> None:
    model = mq.load("mmdit-shapes")
    other = mq.quantize(model, mq.calibrate(model, 16, progress=progress), recipe, progress=progress)
    prompts = model.adapter.prompts("evaluation", num_prompts)
    facts: dict[str, Any] = {
        "coherence": coherence(model, other, prompts),
        "windows": windows(model, other, prompts),
        "sensitivity": sensitivity(model, 4),
    }
    for name, values in facts.items():
        say(f"\n{name}")
        for key, value in values.items():
            say(f"  {key:<24}{value:>10.2f}")
    result({"recipe": recipe, "prompts": num_prompts, **facts})


if __name__ == "__main__":
    main()
