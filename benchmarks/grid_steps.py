"""Which steps a grid should have, and what is left after rounding with feedback: ``python benchmarks/grid_steps.py``.

Layers of ``mmdit-shapes`` one by one, each by the full-precision model's inputs and gradients (16 calibration prompts):
the loss d H dᵀ that GPTQ leaves on grids whose steps were found in several ways, and likewise tr(H_O D H_I Dᵀ) of
two-sided rounding (sketch A, half of the gradients). Told is each layer's loss against that of searched steps, in dB,
averaged over layers; less is better. ``refit`` solves for all rows' steps together in the Kronecker norm, and
``descent`` goes once over all codes in it; neither is a method of mlxquant. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
import numpy as np

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx

from mlxquant.api.plan import plan
from mlxquant.commandline.console import progress, result, say
from mlxquant.curvature.factors import measure
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.layers.tree import get_module
from mlxquant.methods.weights.gptq import damped_problem, gptq
from mlxquant.methods.weights.kron import kron
from mlxquant.methods.weights.regrid import regrid
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.arrays import Array
from mlxquant.numerics.moments import Moments
from mlxquant.recipes.recipe import TwoSided
from mlxquant.sweep.two_sided import aimed

CALIBRATION = 16
WAY = TwoSided("A", 0.5)
BASE = "searched"


def problems(bits: int, every: int) -> Iterator[tuple[str, Array, Moments, Moments]]:
    """Of one layer in so many its path, its weight, and its moments without and with H_O."""
    model = mq.load("mmdit-shapes")
    adapter = model.adapter
    layers = plan(model, mq.parse_recipe(f"kron-w{bits}a16"))
    curvature = measure(adapter, mq.calibrate(model, CALIBRATION).probes(adapter), progress)
    for stage in adapter.stages:
        paths = [path for path, spec in layers.items() if stage.owns(path) and spec.weight.bits < 8][::every]
        for path, seen in curvature.of_stage(adapter, stage, paths).items():
            plain = Moments(seen.gram, seen.tokens)
            both = aimed(plain, seen, WAY)
            if both.outputs is not None:
                yield (
                    path,
                    np.array(get_module(adapter.module, path).weight.astype(mx.float32), np.float64),
                    plain,
                    both,
                )


def refitted(target: Array, grid: Grid, codes: Array, inputs: Array, outputs: Array) -> Grid:
    """The steps of all rows that fit codes best in the Kronecker norm; of symmetric grids with one a row."""
    values = codes.astype(np.float64) - grid.format.zero_code
    pushed = values @ inputs
    normal, right = outputs * (pushed @ values.T), np.einsum("ij,ij->i", outputs @ target @ inputs, values)
    found = np.linalg.lstsq(normal, right, rcond=None)[0]
    return Grid.symmetric(grid.format, np.where(found > 0, found, grid.scales[:, 0])[:, None])


def descended(target: Array, grid: Grid, codes: Array, inputs: Array, outputs: Array) -> Array:
    """Codes after one pass of coordinate descent in the Kronecker norm."""
    error, found = target - grid.dequantize(codes), codes.astype(np.int64)
    steps, power = grid.scales[:, 0].astype(np.float64), np.diagonal(outputs)
    for j in range(target.shape[1]):
        gradient = outputs @ (error @ inputs[:, j])
        for i in range(len(target)):
            wanted = found[i, j] + np.rint(gradient[i] / (power[i] * inputs[j, j] * steps[i]))
            change = np.clip(wanted, 0, grid.format.levels - 1) - found[i, j]
            if change:
                found[i, j] += int(change)
                error[i, j] -= change * steps[i]
                gradient -= outputs[:, i] * inputs[j, j] * change * steps[i]
    return found.astype(np.uint8)


def losses(weight: Array, form: WeightFormat, plain: Moments, both: Moments) -> dict[str, dict[str, float]]:
    """What each way leaves, by rounding."""
    found: dict[str, dict[str, float]] = {}
    rounds: list[tuple[str, Moments, Callable[..., Array]]] = [("gptq", plain, gptq), ("kron", both, kron)]
    for name, moments, rounding in rounds:
        target, inputs = damped_problem(weight, moments.gram.astype(np.float64), 0.01)
        outputs = np.eye(len(weight))
        if moments.outputs is not None:
            outputs = damped_problem(target[:1], moments.outputs.astype(np.float64), 0.05)[1]

        def loss(grid: Grid, codes: Array, target: Array = target, hi: Array = inputs, ho: Array = outputs) -> float:
            error = target - grid.dequantize(codes)
            return float(np.vdot(ho @ error @ hi, error))

        widest, grid = extremes(weight, form), search(weight, form, plain)
        codes = rounding(weight, grid, moments)
        own = {BASE: loss(grid, codes), "unclipped": loss(widest, rounding(weight, widest, moments))}
        for count in (1, 2, 3, 5):
            own[f"regrid, {count} rounds"] = loss(*regrid(weight, grid, codes, moments, rounds=count))
        if name == "kron" and form.symmetric and form.group == "channel":
            own["refit"] = loss(refitted(target, grid, codes, inputs, outputs), codes)
            own["descent"] = loss(grid, descended(target, grid, codes, inputs, outputs))
        found[name] = own
    return found


@click.command(help=__doc__)
@click.option("--format", "forms", multiple=True, default=("w4", "w3", "w2-g64"), show_default=True)
@click.option("--every", type=click.IntRange(1), default=5, show_default=True, help="One layer of a block in so many.")
def main(forms: tuple[str, ...], every: int) -> None:
    gains: dict[str, dict[str, dict[str, list[float]]]] = {}
    for text in forms:
        form = WeightFormat.parse(text)
        for _, weight, plain, both in progress(list(problems(form.bits, every)), text):
            for rounding, own in losses(weight, form, plain, both).items():
                for way, value in own.items():
                    into = gains.setdefault(text, {}).setdefault(rounding, {}).setdefault(way, [])
                    into.append(10 * np.log10(value / own[BASE]))
    means = {
        text: {
            rounding: {way: float(np.mean(values)) for way, values in ways.items()} for rounding, ways in some.items()
        }
        for text, some in gains.items()
    }
    for text, some in means.items():
        say(f"\n| {text} | " + " | ".join(some) + " |\n" + "|---" * (1 + len(some)) + "|")
        for way in dict.fromkeys(way for ways in some.values() for way in ways):
            cells = [f"{ways[way]:+.2f}" if way in ways else "" for ways in some.values()]
            say(f"| {way} | " + " | ".join(cells) + " |")
    result({"layers": len(next(iter(gains.values()))["gptq"][BASE]), "every": every, "dB": means})


if __name__ == "__main__":
    main()
