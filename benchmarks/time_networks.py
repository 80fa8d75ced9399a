"""What scales that follow time are worth, and how they are found: ``python benchmarks/time_networks.py --every 6``.

Layer by layer on ``mmdit-shapes``: the squared error of the layers' outputs that quantized inputs leave on held-out
prompts (``0`` to ``63`` of the evaluation corpus at most), in dB against ``extremes``, the mean over layers and noise
levels. ``calibrated`` is at the 28 noise levels that were calibrated, ``between`` at those of other numbers of steps,
where tables of networks say what holds; ``between, envelope`` is there what the envelope of the neighbouring entries
says instead. ``static`` is one entry for all noise levels. ``--every N`` looks at every N-th of the inputs.
``--pictures`` compares pictures of the held-out prompts, quantized by ``rtn`` with each range, instead. The last line
of stdout is one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

from mlxquant.calibration.trajectories import collect
from mlxquant.commandline.console import progress, result, say
from mlxquant.grids.tables import ActivationTable
from mlxquant.layers.tree import get_module, tapped
from mlxquant.methods import registry
from mlxquant.methods.inputs.time_networks import trained
from mlxquant.methods.inputs.time_ridge import initial
from mlxquant.models.diffusion import diffusion
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.sweep.collecting import Collector
from pictures import Pictures, machine, mean_psnr

STEPS, OTHER_STEPS, CFG = 28, (10, 50), 2.0
RANGES = ("extremes", "error", "grouped", "envelope", "tdq-ridge", "logsnr-ridge", "tdq", "logsnr")
FROM_ONE_STEP = "tdq from one step"  # the paper's start: the same step at all times
FAR = 1e-3  # of a noise level from the nearest calibrated one, to be between them


def seen(model: mq.Model, corpus: str, prompts: int, steps: int, paths: Sequence[str] | None) -> dict[str, InputRanges]:
    """Ranges and sampled rows of layers' inputs, one for layers that read the same array; ``paths`` None: all."""
    adapter = diffusion(model.adapter)
    trajectories = collect(adapter, adapter.prompts(corpus, prompts), steps, CFG, progress)
    sigmas, states = trajectories.batches(adapter)
    roles = adapter.roles()
    wanted = [path for path, role in roles.items() if role not in ("modulation", "embedder", "output")]
    collector = Collector(adapter.layers())
    with tapped(adapter.module, wanted, collector):
        for index in progress(range(len(sigmas)), f"{corpus}, {steps} steps"):
            collector.sigma, state = sigmas[index], states[index]
            with adapter.clock.at(sigmas[index]):
                for stage in adapter.stages:
                    state = stage.run(state)
                mx.eval(state)
    leaders = paths or [path for path in wanted if collector._sharing[path] == path]
    return {path: collector[path].ranges for path in leaders}


def output_errors(table: ActivationTable, ranges: InputRanges, weight: np.ndarray) -> np.ndarray:
    """Squared error of the outputs at each noise level, [T]."""
    step, shift, bits, _ = table.at(ranges.sigma)
    errors = []
    for t, x in enumerate(ranges.rows):
        edge = 2.0 ** (int(bits[t]) - 1)
        stands_for = np.clip(np.rint((x - shift[t]) / step[t]), -edge, edge - 1) * step[t] + shift[t]
        errors.append(np.square((stands_for - x) @ weight.T).sum(dtype=np.float64))
    return np.array(errors)


def found(name: str, ranges: InputRanges, weight: np.ndarray, bits: int) -> ActivationTable:
    """The table of a range method; of ``static`` with one entry, of ``FROM_ONE_STEP`` by a network from there."""
    widest = registry.get("range", "extremes").function
    if name == "static":
        return registry.get("range", "extremes").function(ranges.merged(), weight, bits)
    if name == FROM_ONE_STEP:
        network = trained(initial("timestep", widest(ranges, weight, bits)), ranges, weight, bits)
        return ActivationTable.of_network(network, ranges.sigma, bits)
    table: ActivationTable = registry.get("range", name).function(ranges, weight, bits)
    return table


def layers(names: Iterable[str], widths: Sequence[int], every: int, calibration: int, prompts: int) -> dict[str, Any]:
    model = mq.load("mmdit-shapes")
    calibrated = seen(model, "calibration", calibration, STEPS, None)
    some = list(calibrated)[:: max(1, every)]
    held_out = {steps: seen(model, "evaluation", prompts, steps, some) for steps in (STEPS, *OTHER_STEPS)}
    weights = {path: np.array(get_module(model.adapter.module, path).weight, np.float32) for path in some}
    rows: dict[str, Any] = {}
    for bits in widths:
        widest = {path: found("extremes", calibrated[path], weights[path], bits) for path in some}
        for name in names:
            figures: dict[str, list[float]] = {"calibrated": [], "between": [], "between, envelope": []}
            start = time.process_time()
            tables = {path: found(name, calibrated[path], weights[path], bits) for path in some}
            seconds = (time.process_time() - start) / len(some)
            for path, table in tables.items():
                for steps in held_out:
                    ranges = held_out[steps][path]
                    base = output_errors(widest[path], ranges, weights[path])
                    away = np.abs(ranges.sigma[:, None] - calibrated[path].sigma).min(1) > FAR
                    for label, one, at in (
                        ("calibrated", table, ~away),
                        ("between", table, away),
                        ("between, envelope", replace(table, network=None), away),
                    ):
                        gain = 10 * np.log10(output_errors(one, ranges, weights[path])[at] / base[at])
                        figures[label] += gain.tolist()
            row = {label: float(np.mean(values)) for label, values in figures.items() if values}
            rows[f"{name} a{bits}"] = row | {"seconds_a_layer": seconds}
            say(f"{name} a{bits}: " + ", ".join(f"{key} {value:.2f}" for key, value in rows[f"{name} a{bits}"].items()))
    return {"layers": len(some), "calibration_prompts": calibration, "prompts": prompts, "rows": rows}


def drawn(names: Iterable[str], formats: Sequence[str], calibration: int, prompts: int, steps: int) -> dict[str, Any]:
    pictures, rows = Pictures(prompts), dict[str, Any]()
    calib = mq.calibrate(pictures.model, calibration, steps=steps, progress=progress)
    for form in formats:
        for name in names:
            recipe = f"rtn+{name}-{form}" if name != "extremes" else f"rtn-{form}"
            start = time.process_time()
            done = mq.quantize(pictures.model, calib, recipe, progress=progress)
            seconds = time.process_time() - start
            decibels, accuracy = pictures.scores(done)
            rows[recipe] = mean_psnr(decibels) | {"accuracy": accuracy["mean"], "seconds_quantize": seconds}
            say(f"{recipe}: {rows[recipe]['psnr_db']:.2f} dB, {seconds:.0f} s")
    return {"calibration_prompts": calibration, "prompts": prompts, "calibrated_steps": steps, "rows": rows}


@click.command()
@click.option("--range", "names", multiple=True, help="Range methods.  [default: all that do not fix bits]")
@click.option("--bits", "widths", multiple=True, type=int, default=(8, 4), show_default=True, help="Of inputs.")
@click.option("--every", default=1, show_default=True, help="Look at every so many-th input.")
@click.option("--calibration-prompts", "calibration", default=12, show_default=True)
@click.option("--num-prompts", "prompts", type=click.IntRange(1, 64), default=12, show_default=True, help="Held out.")
@click.option("--pictures", is_flag=True, help="Compare pictures of these prompts instead of layers' outputs.")
@click.option("--steps", default=28, show_default=True, help="With --pictures: steps of the calibration.")
def main(
    names: tuple[str, ...],
    widths: tuple[int, ...],
    every: int,
    calibration: int,
    prompts: int,
    pictures: bool,
    steps: int,
) -> None:
    if pictures:
        formats = [f"w{bits if bits == 4 else 8}a{bits}" for bits in widths]
        figures = drawn(names or RANGES, formats, calibration, prompts, steps)
    else:
        figures = layers(names or ("static", *RANGES, FROM_ONE_STEP), widths, every, calibration, prompts)
    result({"machine": machine(), **figures})


if __name__ == "__main__":
    main()
