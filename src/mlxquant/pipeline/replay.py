"""Replay trajectories and write what the layers read: the folder that ``activation_stats`` reads, a timestep at a time.

Only one timestep is in memory: its statistics are written, listed in the ledger and forgotten, so a killed run loses
one timestep and no more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..calibration.passes import Passes
from ..calibration.trajectories import Calibration
from ..curvature.sensitivity import measure
from ..errors import AdapterError, NumericsError
from ..files import checked
from ..files.checked import write_json
from ..layers.tree import tapped
from ..models.diffusion import DiffusionAdapter
from ..models.edges import whole
from ..numerics.arrays import Array
from ..numerics.input_ranges import RANGE_BATCH
from ..progress import Progress, silent
from ..report.ranges import RangeCurves, draw_ranges
from ..sweep.inputs import may_shift
from .activation_stats import COMMAND, INDEX_KIND, KIND, STATISTICS, ActivationStats, array_name, index_name
from .collecting import Picks, StepCollector, StepInputs
from .ledger import Ledger
from .samples import MANIFEST, Samples

PICTURE = "ranges.png"
ROLES = ("attention", "mlp")
MOMENTUM = 0.95
SENSITIVITY_ROWS = 8  # an average over few suffices
# 16 bins a decade; what is larger is in the last
HIST_EDGES = np.concatenate([[0], np.logspace(-4, 5, 9 * 16 + 1)]).astype(np.float32)


def quantized_layers(adapter: DiffusionAdapter) -> list[str]:
    """The Linears inside a model's blocks whose inputs are quantized; raises AdapterError when there are none."""
    paths = [path for path in adapter.block_linears() if adapter.role(path) in ROLES]
    if not paths:
        raise AdapterError(
            f"{adapter.name} lists no attention or MLP layers in its {len(adapter.blocks)} blocks; expected a"
            " full-precision model"
        )
    return paths


def collect(
    adapter: DiffusionAdapter,
    samples: Samples,
    num_images: int,
    stride: int,
    rows: int,
    seed: int,
    folder: Path,
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    range_batch: int = RANGE_BATCH,
) -> ActivationStats:
    """Replay the first ``num_images`` trajectories at every ``stride``-th step and write the folder, one timestep at a
    time.

    ``rows`` input rows are kept of each layer and timestep, drawn from ``seed``, as are the signs that sensitivities
    are measured with. Averages of minima and maxima are over batches of ``range_batch`` pictures, or of all where those
    are fewer; the folder says how many it was. A killed run goes on at its timestep and ends with the same bytes.
    Raises CalibrationError when the samples are of other weights or fewer than wanted, ArtifactError when the folder
    holds other statistics and ``force`` is not given, NumericsError, naming layer and timestep, on NaN, AdapterError
    when a layer is never reached.
    """
    samples.check(adapter)
    adapter.check_finite()
    paths = quantized_layers(adapter)
    calibration = samples.calibration(num_images, stride)
    facts = {
        "model": samples.model,
        "source": samples.source,
        "parents": {MANIFEST: samples.sha256},
        "num_images": num_images,
        "stride": stride,
        "rows": rows,
        "range_batch": min(range_batch, num_images),
        "momentum": MOMENTUM,
        "sensitivity_rows": SENSITIVITY_ROWS,
        "seed": seed,
        "batch": adapter.batch,
        "versions": checked.versions(),
    }
    ledger = Ledger.open(folder / STATISTICS, KIND, facts, COMMAND, force, resume)
    with ledger.same_blas():
        return _fill(ledger, adapter, calibration, paths, progress)


def _fill(
    ledger: Ledger, adapter: DiffusionAdapter, calibration: Calibration, paths: list[str], progress: Progress
) -> ActivationStats:
    """Write what the ledger does not list yet."""
    settings = ("num_images", "stride", "rows", "range_batch", "seed")
    num_images, stride, rows, range_batch, seed = (int(ledger.facts[name]) for name in settings)
    if not ledger.complete:
        adapter.prepare(calibration.prompts, calibration.guidance.negative)
    after = {path: edge.after for edge in whole(adapter.edges()) for path in edge.consumers}
    sigma_map = {str(index * stride): float(sigma) for index, sigma in enumerate(calibration.sigmas)}
    for index, step in progress(list(enumerate(sigma_map)), "timesteps"):
        if array_name(step) in ledger.files and index_name(step) in ledger.files:
            continue
        at_step = calibration.part(steps=slice(index, index + 1))
        where = f"step {step} (sigma {sigma_map[step]:.4g})"
        seen = _run(
            adapter,
            at_step,
            paths,
            Picks.draw(rows, calibration.sides * num_images, (seed, index * stride)),
            range_batch,
            where,
            progress,
        )
        layers = {path: {"leader": seen.leader[path], "after": after.get(path, "")} for path in paths}
        widths = {leader: len(inputs.ranges.least) for leader, inputs in seen.layers.items()}
        ledger.notes |= {
            "sigma_map": sigma_map,
            "step_keys": list(sigma_map),
            "paths": paths,
            "layers": {path: {**layer, "width": widths[layer["leader"]]} for path, layer in layers.items()},
        }
        costs = _costs(adapter, at_step, paths, SENSITIVITY_ROWS // calibration.sides, seed + index, progress)
        _write(
            ledger,
            step,
            sigma_map[step],
            seen.layers,
            {leader for leader in seen.layers if may_shift(after.get(leader, ""))},
            costs,
        )
        ledger.save()
    stats = ActivationStats(ledger)
    if not ledger.complete:
        draw_ranges(_curves(stats), ledger.folder / PICTURE)
        ledger.save(complete=True)
    return stats


def _run(
    adapter: DiffusionAdapter,
    calibration: Calibration,
    paths: list[str],
    picks: Picks,
    range_batch: int,
    where: str,
    progress: Progress = silent,
) -> StepCollector:
    """What the layers at ``paths`` read at the one timestep of ``calibration``; ``where`` names that for the reader."""
    collector = StepCollector(picks, MOMENTUM, calibration.sides, range_batch)
    with tapped(adapter.module, paths, collector):
        for start in progress(range(0, len(calibration.prompts), adapter.batch), where):
            part = calibration.part(pictures=slice(start, start + adapter.batch))
            for sigma, state in zip(*part.in_order(adapter), strict=True):
                with adapter.clock.at(sigma):
                    for stage in adapter.stages[:-1]:
                        state = collector.before(stage.run(state))
                    try:
                        collector.add()
                    except NumericsError as error:
                        raise NumericsError(
                            f"{where}: {error}; this model overflows on these trajectories, or they are damaged"
                        ) from error
    if missed := [path for path in paths if path not in collector.leader]:
        raise AdapterError(
            f"{adapter.name}: {len(missed)} of {len(paths)} layers were never reached, the first is {missed[0]}"
        )
    return collector


def _costs(
    adapter: DiffusionAdapter, calibration: Calibration, paths: list[str], images: int, seed: int, progress: Progress
) -> dict[str, Array]:
    """The sensitivity [out] float32 of each layer at the one timestep of ``calibration``, on its first ``images``."""
    some = calibration.part(pictures=slice(images))
    sigmas, states = some.batches(adapter, adapter.batch)
    found = measure(Passes(adapter, sigmas, progress), adapter.stages, states, paths, seed)
    return {path: costs[0].astype(np.float32) for path, costs in found.layers.items()}


def _write(
    ledger: Ledger, step: str, sigma: float, layers: dict[str, StepInputs], centred: set[str], costs: dict[str, Array]
) -> None:
    """The two files of a timestep; ``centred`` are the leaders whose moving centre is kept, ``costs`` every layer's
    sensitivities.
    """
    arrays: dict[str, Array] = {
        "hist_edges": HIST_EDGES,
        **{f"{path}__sensitivity": values for path, values in costs.items()},
    }
    index = {}
    for leader, inputs in layers.items():
        seen, magnitudes = inputs.ranges, np.abs(inputs.ranges.rows)
        arrays |= {
            f"{leader}__avg_min": seen.low,
            f"{leader}__avg_max": seen.high,
            f"{leader}__min": seen.least,
            f"{leader}__max": seen.most,
            f"{leader}__hist": np.histogram(np.minimum(magnitudes, HIST_EDGES[-1]), HIST_EDGES)[0],
            f"{leader}__rows": _half(seen.rows),
        }
        if leader in centred:
            arrays[f"{leader}__shift"] = inputs.centre.value
        index[leader] = _summary(inputs, magnitudes)
    ledger.add_npz(array_name(step), arrays)
    means = {path: float(values.mean()) for path, values in costs.items()}
    write_json(
        ledger.path_of(index_name(step)),
        INDEX_KIND,
        {"step": step, "sigma": sigma, "layers": index, "sensitivity": means},
    )
    ledger.add([index_name(step)])


def _half(rows: Array) -> Array:
    """float16 where that holds every value, float32 elsewhere."""
    return rows.astype(np.float16) if np.abs(rows).max() <= np.finfo(np.float16).max else rows


def _summary(inputs: StepInputs, magnitudes: Array) -> dict[str, float]:
    """``tensor_*`` are over all channels and tokens, ``tensor_avg_*`` of them the lowest and the highest channel's mean
    over batches, ``channel_*`` percentiles over channels of a channel's largest magnitude, and ``hist_*`` percentiles
    of the absolute values that the histogram counts.
    """
    seen = inputs.ranges
    peaks = np.maximum(np.abs(seen.least), np.abs(seen.most))
    p50, p99, p999 = np.percentile(magnitudes, [50, 99, 99.9])
    numbers = {
        "tensor_absmax": peaks.max(),
        "tensor_min": seen.least.min(),
        "tensor_max": seen.most.max(),
        "tensor_avg_min": seen.low.min(),
        "tensor_avg_max": seen.high.max(),
        "hist_p50": p50,
        "hist_p99": p99,
        "hist_p999": p999,
        "channel_p99": np.percentile(peaks, 99),
        "channel_p100": peaks.max(),
    }
    return {name: float(number) for name, number in numbers.items()}


def _curves(stats: ActivationStats) -> dict[str, RangeCurves]:
    """What the picture shows of each leader, from the summaries alone."""
    curves = {}
    for leader in stats.leaders:
        summary = stats.summary(leader)
        names = ("tensor_avg_min", "tensor_avg_max", "tensor_min", "tensor_max")
        curves[leader] = RangeCurves(stats.sigmas, *(np.array([at[name] for at in summary]) for name in names))
    return curves
