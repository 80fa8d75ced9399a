"""How far quantized weights are from what their bytes allow: ``python benchmarks/limits.py --work WORK``.

Of each layer in attention and MLP: the loss, which is the squared error of its output on the calibration's inputs; the
least loss that any code of as many bits could have, by rate-distortion theory (``numerics/rate_distortion.py``); how
many bits fewer would do for the loss that there is; and the entropy of its codes. Bits are stored ones, scales
included. Decibels are relative to the layer's output and averaged over layers, as all figures of layers are.

Then the same of the whole model, under what weight errors do to the guided velocity, tr(H_O D H_I D^T) with factors of
gradients (arXiv 2505.22988, sketch B): decibels are relative to the velocity and to first order, and losses of layers
are summed. Limit and bits above it are of layers whose shares of the bits stay as they are; rows have the limit with
bits wherever they buy most, too.

Rows are of ``mmdit-shapes``, quantized now from 16 calibration prompts or, with ``--model FOLDER``, as it was saved.
Losses and limits are of the first ``--prompts`` of them, gradients of every fourth step of the sampler. Few samples
make factors look as if most directions did not matter, and limits too low. Recipes that transform weights are refused:
their codes stand for other weights than the model's. What aims at something else than the layer's own output
(``qronos``, ``+corrected``) shows more loss here than it does. Rows that are in ``WORK.jsonl`` already are not computed
again. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log10
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

import recipe_tables
from mlxquant.api.model import Model, QuantizedModel
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import progress, result, say
from mlxquant.layers.kinds import known_kind
from mlxquant.layers.tree import StandIn, get_module, swapped, tapped
from mlxquant.models.diffusion import DiffusionAdapter
from mlxquant.numerics.arrays import Array
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.rate_distortion import Spectrum, entropy, least_bits, least_loss, loss, spectrum
from mlxquant.sampling.guidance import guided
from mlxquant.sweep.collecting import Sharing
from recipe_tables import Figures
from rows import Rows

CALIBRATION = 16  # prompts
ROLES = ("attention", "mlp")
EVERY, TOGETHER = 4, 8  # of the sampler's steps, for gradients; pictures in a backward pass
ROWS = """rtn-w4a16 gptq-w4a16 descent+refit-w4a16 mixed-w4a16 rtn-w4a16-g64 gptq-w4a16-g64
    rtn-w3a16 gptq-w3a16 mixed-w3a16 rtn-w2a16-g64 gptq-w2a16-g64"""
MEANS = ("bits", "loss_db", "limit_db", "bits_above", "entropy")


@dataclass(frozen=True)
class Metric:
    """What errors in a layer's weight cost.

    Attributes:
        weight: In full precision, float32 [rows,in].
        inputs: A factor [in,in] for each of the parts that its rows are cut into.
        outputs: The factor [rows,rows] on the other side, of a weight in one part; None for the identity.
    """

    weight: Array
    inputs: Sequence[Array]
    outputs: Array | None = None

    def loss(self, change: Array) -> float:
        """Of a change of the weight."""
        parts = np.split(change, len(self.inputs))
        return sum(loss(some, factor, self.outputs) for some, factor in zip(parts, self.inputs, strict=True))

    @cached_property
    def signal(self) -> float:
        """The cost of leaving it away."""
        return self.loss(self.weight)

    @cached_property
    def spectra(self) -> list[Spectrum]:
        parts = np.split(self.weight, len(self.inputs))
        return [spectrum(some, factor, self.outputs) for some, factor in zip(parts, self.inputs, strict=True)]


def quantized_paths(model: Model) -> list[str]:
    """The layers that figures are of."""
    roles = model.adapter.roles()
    return [path for path in model.adapter.layers() if roles[path] in ROLES]


def grams(model: Model, calib: Calibration, paths: Sequence[str]) -> dict[str, list[Array]]:
    """Second moments of what each layer reads in full precision, one a part of its weight: float64 [in,in]."""
    layers = {path: get_module(model.module, path) for path in paths}
    sharing, found = Sharing(layers), dict[str, list[Moments]]()

    def observe(path: str, *call: Any) -> None:
        if not sharing.leads(path, *call):
            return
        read = known_kind(layers[path]).form.read(layers[path], *call).parts
        moments = found.setdefault(path, [Moments.empty(some.shape[-1], np.float64) for some in read])
        for one, some in zip(moments, read, strict=True):
            one.add(some)

    sigmas, states = calib.batches(model.adapter)
    with tapped(model.module, paths, observe):
        for index in progress(range(len(sigmas)), "inputs"):
            state = states[index]
            with model.adapter.clock.at(sigmas[index]):
                for stage in model.adapter.stages:
                    state = stage.run(state)
                mx.eval(state)
    return {path: [one.gram for one in found[sharing[path]]] for path in paths}


class Dialled(StandIn):
    """A layer that shows what it reads, and adds a dial, where there is one, to what it writes."""

    def __init__(self, layer: Any, path: str, reads: dict[str, mx.array], dials: dict[str, mx.array]):
        super().__init__(layer)
        self._path, self._reads, self._dials = path, reads, dials

    def __call__(self, x: mx.array) -> mx.array:
        self._reads[self._path] = x
        y = self._layer(x)
        return y + self._dials[self._path] if self._path in self._dials else y


def gradients(
    adapter: DiffusionAdapter, calib: Calibration, step: int, pictures: slice, paths: Sequence[str], key: mx.array
) -> tuple[dict[str, Array], Array]:
    """The gradient of <r, guided velocity> with respect to each weight, r random signs, one a picture: float32
    [B,out,in]; and the guided velocity.
    """
    reads, dials = dict[str, mx.array](), dict[str, mx.array]()
    some, sigma = calib.part(pictures=pictures), float(calib.sigmas[step])
    text, other = adapter.both_sides([prompt.text for prompt in some.prompts], calib.guidance)
    latent, count = some.latents[step], len(some.prompts)

    def velocity() -> mx.array:
        return guided(adapter.velocity, latent, sigma, text, other, calib.guidance)

    def run(*arrays: mx.array) -> list[mx.array]:
        dials.update(zip(paths, arrays, strict=True))
        return [velocity()]

    layers = {path: Dialled(get_module(adapter.module, path), path, reads, dials) for path in paths}
    with swapped(adapter.module, dict(layers)):
        exact = velocity()
        mx.eval(exact, reads)
        seen = dict(reads)
        zeros = [mx.zeros((*seen[path].shape[:-1], layers[path].weight.shape[0])) for path in paths]
        signs = mx.random.bernoulli(0.5, exact.shape, key).astype(mx.float32) * 2 - 1
        _, slopes = mx.vjp(run, zeros, [signs])
        mx.eval(slopes)
    found = {}
    for path, slope in zip(paths, slopes, strict=True):  # rows: all pictures with their prompt, then without
        x, g = (np.array(v.astype(mx.float32)) for v in (seen[path], slope))
        x, g = (v.reshape(-1, count, v[0].size // v.shape[-1], v.shape[-1]) for v in (x, g))
        found[path] = sum(np.einsum("bto,bti->boi", gs, xs, optimize=True) for gs, xs in zip(g, x, strict=True))
    return found, np.array(exact)


def factors(
    model: Model, calib: Calibration, paths: Sequence[str], seed: int = 0
) -> tuple[dict[str, tuple[Array, Array]], float]:
    """H_I [in,in] and H_O [out,out] of layers whose errors reach the velocity, from all of some trajectories: in their
    product a weight error costs mean squared guided velocity. And the mean square of that velocity.
    """
    sums: dict[str, list[Any]] = {path: [0.0, 0.0] for path in paths}
    keys, power = iter(mx.random.split(mx.random.key(seed), 10000)), list[float]()
    count, elements = 0, int(np.prod(calib.latents.shape[2:]))
    for step in progress(range(len(calib.sigmas)), "gradients"):
        for start in range(0, len(calib.prompts), TOGETHER):
            some = slice(start, start + TOGETHER)
            found, velocity = gradients(model.diffusion, calib, step, some, paths, next(keys))
            for path, each in found.items():
                wide = np.concatenate(list(each), 1, dtype=np.float64)
                tall = np.concatenate(list(each), 0, dtype=np.float64)
                sums[path][0] += tall.T @ tall
                sums[path][1] += wide @ wide.T
            power.append(float(np.square(velocity).mean()))
            count += len(velocity)
    reached = {path: pair for path, pair in sums.items() if np.trace(pair[0]) > 0}
    scaled = {path: (of_in / np.trace(of_in), of_out / (count * elements)) for path, (of_in, of_out) in reached.items()}
    return scaled, float(np.mean(power))


class Bench:
    """``mmdit-shapes`` in full precision with what its inputs and gradients say, collected when they are first asked
    for.
    """

    def __init__(self, work: Path, prompts: int = CALIBRATION):
        self.model = mq.load("mmdit-shapes")
        self.rows = Rows(work, model=self.model.adapter.fingerprint[:8], prompts=prompts)
        self.prompts = prompts
        self.paths = quantized_paths(self.model)

    @cached_property
    def calibration(self) -> Calibration:
        return mq.calibrate(self.model, CALIBRATION, progress=progress)

    @cached_property
    def seen(self) -> Calibration:
        """What losses are of."""
        if self.prompts == CALIBRATION:
            return self.calibration
        return mq.calibrate(self.model, self.prompts, progress=progress)

    @cached_property
    def layers(self) -> dict[str, Metric]:
        """By what each layer writes."""
        found = grams(self.model, self.seen, self.paths)
        return {path: Metric(matrix(self.model, path), found[path]) for path in self.paths}

    @cached_property
    def velocity(self) -> tuple[dict[str, Metric], float]:
        """By what the model predicts, and the mean square of that."""
        found, power = factors(self.model, self.seen.part(steps=slice(None, None, EVERY)), self.paths)
        return {path: Metric(matrix(self.model, path), [a], b) for path, (a, b) in found.items()}, power

    def quantized(self, recipe: str) -> QuantizedModel:
        return mq.quantize(self.model, self.calibration, recipe, progress=progress)

    def saved(self, folder: Path) -> QuantizedModel:
        """A quantized model; ClickException on any other."""
        other = mq.load(str(folder))
        if not isinstance(other, QuantizedModel) or other.name != self.model.name:
            raise click.ClickException(f"{folder}: holds {other.name}; name a quantized {self.model.name}")
        return other

    def measure(self, other: QuantizedModel) -> Figures:
        return measured(other, self.layers, *self.velocity)


def measured(
    other: QuantizedModel, layers: Mapping[str, Metric], velocity: Mapping[str, Metric], power: float
) -> Figures:
    """The figures of a model that was quantized without transforms.

    Args:
        other: The model.
        layers: By path, by what each layer writes.
        velocity: By path, by what the model predicts.
        power: The mean square of that.
    """
    refuse_transforms(other)
    each = {path: layer_figures(other, path, metric) for path, metric in layers.items()}
    left = sum(metric.loss(metric.weight - other.layers[path].effective()) for path, metric in velocity.items())
    bits = {path: other.layers[path].bits_per_weight for path in velocity}
    mean = float(np.average(list(bits.values()), weights=[metric.weight.size for metric in velocity.values()]))
    as_they_are = sum(least_loss(metric.spectra, bits[path]) for path, metric in velocity.items())
    together = [one for metric in velocity.values() for one in metric.spectra]
    return {
        **{name: float(np.mean([figures[name] for figures in each.values()])) for name in MEANS},
        "bits_per_weight": other.size.bits_per_weight,
        "velocity_loss_db": decibels(power, left),
        "velocity_limit_db": decibels(power, as_they_are),
        "velocity_free_limit_db": decibels(power, least_loss(together, mean)),
        "velocity_bits_above": bits_above(list(velocity.values()), list(bits.values()), left),
        "layers": {path: [round(figures[name], 3) for name in MEANS] for path, figures in each.items()},
    }


def bits_above(metrics: Sequence[Metric], bits: Sequence[float], left: float) -> float:
    """How many bits fewer in every layer have a limit of this loss, to a thousandth."""
    low, high = 0.0, max(bits)
    while high - low > 1e-3:
        middle = (low + high) / 2
        limit = sum(least_loss(one.spectra, max(own - middle, 0)) for one, own in zip(metrics, bits, strict=True))
        low, high = (middle, high) if limit < left else (low, middle)
    return (low + high) / 2


def refuse_transforms(other: QuantizedModel) -> None:
    """ClickException where codes stand for other weights than the model's."""
    names = {name for _, spec in other.facts["recipe"]["rules"] if spec for name in spec["transforms"]}
    if names:
        raise click.ClickException(
            f"{other.facts['recipe']['name']}: its codes are of weights after {' and '.join(sorted(names))}, which"
            " nothing here undoes; choose a recipe without transforms"
        )


def matrix(model: Model, path: str) -> Array:
    """A layer's weight in full precision, float32 [rows,in]."""
    layer = get_module(model.module, path)
    kind = known_kind(layer)
    return np.array(kind.form.matrix_of(layer).astype(mx.float32)).reshape(kind.shape(layer))


def layer_figures(other: QuantizedModel, path: str, metric: Metric) -> Figures:
    """Of one layer."""
    layer = other.layers[path]
    bits, left = layer.bits_per_weight, metric.loss(metric.weight - layer.effective())
    return {
        "bits": bits,
        "loss_db": decibels(metric.signal, left),
        "limit_db": decibels(metric.signal, least_loss(metric.spectra, bits)),
        "bits_above": bits - least_bits(metric.spectra, left),
        "entropy": entropy(np.bincount(layer.codes().ravel())),
    }


def decibels(signal: float, left: float) -> float:
    return 10 * log10(signal / left)


TITLES = (
    "bits", "loss dB", "limit dB", "bits above", "entropy of codes", "velocity: loss dB", "limit dB", "bits above",
)  # fmt: skip


def tables(figures: Mapping[str, Figures]) -> str:
    """Of all recipes, a table a format."""
    return recipe_tables.tables(dict(figures), ("w4a16", "w4a16-g64", "w3a16", "w2a16-g64"), TITLES, line)


def line(name: str, figures: Figures) -> str:
    cells = [f"`{name}`", *(f"{figures[key]:.2f}" for key in MEANS)]
    cells += [f"{figures[f'velocity_{key}']:.2f}" for key in ("loss_db", "limit_db", "bits_above")]
    return f"| {' | '.join(cells)} |"


@click.command(help=__doc__)
@click.option("--row", "names", multiple=True, help="Only these recipes; any without transforms will do.")
@click.option("--model", "folders", multiple=True, type=click.Path(path_type=Path, exists=True), help="Saved models.")
@click.option("--prompts", type=click.IntRange(1), default=CALIBRATION, show_default=True, help="That losses are of.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(names: tuple[str, ...], folders: tuple[Path, ...], prompts: int, table: bool, work: Path) -> None:
    bench = Bench(work, prompts)
    if not table:
        for folder in folders:
            other = bench.saved(folder)
            bench.rows.kept(other.facts["recipe"]["name"], lambda other=other: bench.measure(other))
        for name in names or (() if folders else ROWS.split()):
            bench.rows.kept(name, lambda name=name: bench.measure(bench.quantized(name)))
    figures = bench.rows.figures()
    say(tables(figures))
    result({"rows": {name: {key: row[key] for key in row if key != "layers"} for name, row in figures.items()}})


if __name__ == "__main__":
    main()
