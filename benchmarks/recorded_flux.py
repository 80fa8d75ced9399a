"""What recording and quantizing FLUX.1 takes, at its real width: seconds, memory, and what calibration gains.

    python benchmarks/recorded_flux.py

Builds mflux's own transformer of FLUX.1-schnell with one block of each kind (3072 channels) and random weights, records
some calls at 256x256 pixels, and quantizes it in place. Each recipe has a process of its own, whose peak resident
memory is its own, too; the errors are those of what the transformer returns, relative, over the recorded calls and over
two that nothing saw. Random weights say what it takes, not what pictures lose. Everything is float32, for CPUs are
slow at bfloat16. The last line on stdout is one JSON object. Needs mflux: ``pip install --no-deps mflux==0.24.0``.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import json

import mlx.core as mx
import mlx.nn as nn
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.model.flux_transformer.transformer import Transformer

from mlxquant.commandline.console import peak_bytes, progress, result, say
from mlxquant.files import checked

TOKENS = 256  # of text; what schnell's T5 gives
SEEN, UNSEEN = 0, 1  # seeds of calls


def transformer(seed: int = 0) -> nn.Module:
    """One double and one single block at the real width, and all that stands around them."""
    ModelConfig.precision = mx.float32
    mx.random.seed(seed)
    made = Transformer(ModelConfig.schnell(), num_transformer_blocks=1, num_single_transformer_blocks=1)
    mx.eval(made.parameters())
    return made


def run(model: nn.Module, pixels: int, count: int, seed: int) -> list[mx.array]:
    """What the transformer returns at ``count`` steps of as many pictures; inputs are noise."""
    config = Config(ModelConfig.schnell(), num_inference_steps=count, height=pixels, width=pixels)
    wrote = []
    for step in range(count):
        keys = mx.random.split(mx.random.key(1000 * seed + step), 3)
        wrote.append(
            model(
                t=step,
                config=config,
                hidden_states=mx.random.normal((1, config.image_seq_len, 64), key=keys[0]),
                prompt_embeds=0.2 * mx.random.normal((1, TOKENS, 4096), key=keys[1]),
                pooled_prompt_embeds=mx.random.normal((1, 768), key=keys[2]),
            )
        )
        mx.eval(wrote[-1])
    return wrote


def error(wrote: list[mx.array], wanted: list[mx.array]) -> float:
    """Squared difference, relative."""
    noise = sum(float(mx.square(a - b).sum()) for a, b in zip(wrote, wanted, strict=True))
    return noise / sum(float(mx.square(b).sum()) for b in wanted)


class Stopwatch:
    """Wall and process seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = part()
        self.seconds[name], self.cpu_seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        say(f"{name}: {self.seconds[name]:.1f} s, {self.cpu_seconds[name]:.1f} s of CPU, {peak_bytes() / 1e9:.2f} GB")
        return made


def measure(recipe: str, pixels: int, calls: int) -> dict[str, Any]:
    """Build, record and quantize in this process."""
    timed = Stopwatch()
    model = timed("build", transformer)
    wanted = {UNSEEN: timed("unseen", lambda: run(model, pixels, 2, UNSEEN))}

    def record() -> Any:
        with mq.recording(model) as seen:
            wanted[SEEN] = run(model, pixels, calls, SEEN)
        return seen

    seen = timed("record", record)
    report = timed("quantize", lambda: mq.quantize_module(model, seen, recipe, progress=progress))
    peak = peak_bytes()
    return {
        "recipe": recipe,
        "blocks": list(report.blocks),
        "whole": report.whole,
        "seconds": timed.seconds,
        "cpu_seconds": timed.cpu_seconds,
        "peak_bytes": peak,
        "weights": report.sizes.weights,
        "bytes_before": report.sizes.before,
        "bytes_after": report.sizes.after,
        "error": error(run(model, pixels, calls, SEEN), wanted[SEEN]),
        "error_unseen": error(run(model, pixels, 2, UNSEEN), wanted[UNSEEN]),
    }


def in_own_process(recipe: str, pixels: int, calls: int) -> dict[str, Any]:
    options = [f"--only={recipe}", f"--pixels={pixels}", f"--calls={calls}"]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@click.command(help=__doc__)
@click.option("--recipe", "recipes", multiple=True, default=["gptq-w4a16-g64", "rtn-w4a16-g64"], show_default=True)
@click.option("--pixels", default=256, show_default=True, help="Width and height.")
@click.option("--calls", default=4, show_default=True, help="How many are recorded.")
@click.option("--only", hidden=True, help="This recipe, in this process.")
def main(recipes: tuple[str, ...], pixels: int, calls: int, only: str | None) -> None:
    if only:
        return result(measure(only, pixels, calls))
    rows = [in_own_process(recipe, pixels, calls) for recipe in recipes]
    say(f"{'recipe':<18}{'seconds':>9}{'CPU s':>9}{'peak GB':>9}{'error':>11}{'unseen':>11}")
    for row in rows:
        seconds, cpu = (row[key]["record"] + row[key]["quantize"] for key in ("seconds", "cpu_seconds"))
        say(
            f"{row['recipe']:<18}{seconds:>9.1f}{cpu:>9.1f}{row['peak_bytes'] / 1e9:>9.2f}{row['error']:>11.3e}"
            f"{row['error_unseen']:>11.3e}"
        )
    result(
        {
            "benchmark": "recorded_flux",
            "pixels": pixels,
            "calls": calls,
            "text_tokens": TOKENS,
            "rows": rows,
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "mflux": version("mflux"),
            **checked.versions(),
        }
    )


if __name__ == "__main__":
    main()
