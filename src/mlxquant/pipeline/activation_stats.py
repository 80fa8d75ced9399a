"""What the inputs of a model's attention and MLP layers look like at every timestep of real trajectories.

A folder of ``timestep_stats/step_K.npz``, K the sampler's step, with per-channel arrays, and ``step_K_index.json`` with
a few numbers of each layer, under ``layer_statistics.json``. Layers that read the same tensor (q, k and v) have one
entry, their leader's; what an error of its outputs costs in the velocity is each layer's own. Modulation, embedders and
the output layer keep their inputs and have none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.trajectories import Calibration
from ..errors import AdapterError, ArtifactError, NumericsError
from ..files import checked
from ..files.checked import file_digest, read_json, write_json
from ..layers.tree import tapped
from ..models.diffusion import DiffusionAdapter
from ..numerics.arrays import Array
from ..numerics.input_ranges import InputRanges
from ..progress import Progress, silent
from ..report.ranges import RangeCurves, draw_ranges
from ..sampling.guidance import sides
from ..sweep.sensitivity import measure
from .collecting import Picks, StepCollector, StepInputs
from .ledger import Ledger
from .samples import MANIFEST, Samples

KIND, INDEX_KIND = "activation-statistics", "activation-summary"
STATISTICS, PICTURE = "layer_statistics.json", "ranges.png"
COMMAND = "mlxquant collect-layer-activations"
ROLES = ("attention", "mlp")
MOMENTUM = 0.95
SENSITIVITY_ROWS = 8  # an average over few suffices
HIST_EDGES = np.concatenate([[0], np.logspace(-4, 5, 9 * 16 + 1)]).astype(
    np.float32
)  # 16 bins a decade; what is larger is in the last


def array_name(step: str) -> str:
    return f"timestep_stats/step_{step}.npz"


def index_name(step: str) -> str:
    return f"timestep_stats/step_{step}_index.json"


class ActivationStats:
    """A folder of activation statistics, read layer by layer; each file's checksum is verified once, before its first
    use.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._layers: dict[str, dict[str, Any]] = ledger.notes["layers"]
        self._sigma: dict[str, float] = ledger.notes["sigma_map"]
        self._verified: set[str] = set()
        self._latest: tuple[str, dict[str, Array]] | None = None  # q, k and v are asked for one after the other

    @classmethod
    def read(cls, path: Path) -> ActivationStats:
        """The folder of a ``layer_statistics.json``; raises ArtifactError when that is missing, unfinished, damaged or
        foreign.
        """
        return cls(Ledger.read(path, KIND, f"run '{COMMAND}' first").require_complete(COMMAND))

    @property
    def model(self) -> str:
        return str(self.ledger.facts["model"])

    @property
    def source(self) -> str:
        """Fingerprint of the model's weights."""
        return str(self.ledger.facts["source"])

    @property
    def sha256(self) -> str:
        return self.ledger.sha256

    @property
    def calibration(self) -> str:
        """sha256 of the manifest whose trajectories were replayed."""
        return str(self.ledger.facts["parents"][MANIFEST])

    @property
    def layers(self) -> list[str]:
        """Every layer, in the model's order."""
        return list(self.ledger.notes["paths"])

    @property
    def leaders(self) -> list[str]:
        """The layers that have entries of their own."""
        return [path for path in self.layers if self.leader(path) == path]

    @property
    def step_keys(self) -> list[str]:
        """Sampler steps, as in the files' names, by ascending sigma."""
        return sorted(self._sigma, key=self._sigma.__getitem__)

    @property
    def sigmas(self) -> Array:
        """[T] float32, ascending."""
        return np.array([self._sigma[step] for step in self.step_keys], np.float32)

    def _layer(self, path: str) -> dict[str, Any]:
        if path not in self._layers:
            raise ArtifactError(
                f"{self.ledger.path}: has no layer {path!r}; it has {len(self._layers)}, such as {self.layers[0]!r}"
            )
        return self._layers[path]

    def leader(self, path: str) -> str:
        """The layer under whose name the statistics of this one are."""
        return str(self._layer(path)["leader"])

    def after(self, path: str) -> str:
        """The nonlinearity that wrote this layer's input, such as "gelu"; "" when there is none."""
        return str(self._layer(path)["after"])

    def ranges(self, path: str) -> InputRanges:
        """Of the layer's input, one row a timestep; ``rows`` are samples of it."""
        found = self._arrays(path)
        return InputRanges(self.sigmas, found["avg_min"], found["avg_max"], found["min"], found["max"], found["rows"])

    def shift(self, path: str) -> Array | None:
        """The moving centre [T,in] float32 of each channel of an input that a GELU wrote, None for others."""
        return self._arrays(path).get("shift")

    def sensitivity(self, path: str) -> Array:
        """What a unit of mean squared error of each of the layer's outputs costs in squared velocity error, [T,out]
        float32.
        """
        self._layer(path)
        return self._stacked([name := f"{path}__sensitivity"])[name]

    def histogram(self, path: str) -> tuple[Array, Array]:
        """Edges [bins + 1] and counts [T,bins] of the absolute values of the sampled rows; the last bin has everything
        above it, too.
        """
        found = self._arrays(path)
        return found["edges"], found["hist"]

    def summary(self, path: str) -> list[dict[str, float]]:
        """A few numbers of the layer at each timestep."""
        leader = self.leader(path)
        return [index["layers"][leader] for index in self._indices]

    @cached_property
    def _indices(self) -> list[dict[str, Any]]:
        return [read_json(self._file(index_name(step)), INDEX_KIND) for step in self.step_keys]

    def _file(self, name: str) -> Path:
        path = self.ledger.folder / name
        if name not in self._verified:
            if (found := file_digest(path)) != (expected := self.ledger.files.get(name, "")):
                raise ArtifactError(
                    f"{path}: sha256 {found[:12]}… is not the {expected[:12]}… in {STATISTICS}; the file was changed or"
                    f" damaged, run '{COMMAND} --force'"
                )
            self._verified.add(name)
        return path

    def _arrays(self, path: str) -> dict[str, Array]:
        """A layer's arrays, its leader's, over timesteps [T,...]."""
        leader = self.leader(path)
        if self._latest is None or self._latest[0] != leader:
            self._latest = (leader, self._read(leader))
        return self._latest[1]

    def _read(self, leader: str) -> dict[str, Array]:
        names = [
            "avg_min",
            "avg_max",
            "min",
            "max",
            "hist",
            "rows",
            *(["shift"] if self.after(leader) == "gelu" else []),
        ]
        found = self._stacked(["hist_edges", *(f"{leader}__{name}" for name in names)])
        own = {name: found[f"{leader}__{name}"] for name in names}
        return {**own, "rows": own["rows"].astype(np.float32), "edges": found["hist_edges"][0]}

    def _stacked(self, names: list[str]) -> dict[str, Array]:
        """Arrays of the steps' files, over timesteps [T,...]."""
        parts: dict[str, list[Array]] = {name: [] for name in names}
        for step in self.step_keys:
            with np.load(self._file(array_name(step)), allow_pickle=False) as file:
                for name, values in parts.items():
                    values.append(file[name])
        return {name: np.stack(values) for name, values in parts.items()}


def quantized_layers(adapter: DiffusionAdapter) -> list[str]:
    """The Linears inside a model's blocks whose inputs are quantized; raises AdapterError when there are none."""
    blocks = adapter.stages[1:-1]
    paths = [
        path for path in adapter.linears() if adapter.role(path) in ROLES and any(block.owns(path) for block in blocks)
    ]
    if not paths:
        raise AdapterError(
            f"{adapter.name} lists no attention or MLP layers in its {len(blocks)} blocks; expected a full-precision"
            " model"
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
) -> ActivationStats:
    """Replay the first ``num_images`` trajectories at every ``stride``-th step and write the folder, one timestep at a
    time.

    ``rows`` input rows are kept of each layer and timestep, drawn from ``seed``, as are the signs that sensitivities
    are measured with. A killed run goes on at its timestep and ends with the same bytes. Raises CalibrationError when
    the samples are of other weights or fewer than wanted, ArtifactError when the folder holds other statistics and
    ``force`` is not given, NumericsError, naming layer and timestep, on NaN, AdapterError when a layer is never
    reached.
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
        "momentum": MOMENTUM,
        "sensitivity_rows": SENSITIVITY_ROWS,
        "seed": seed,
        "batch": adapter.batch,
        "versions": checked.versions(),
    }
    rows_of_image = len(sides(calibration.cfg))
    ledger = Ledger.open(folder / STATISTICS, KIND, facts, COMMAND, force, resume)
    if not ledger.complete:
        adapter.prepare(calibration.prompts)
    sigma_map = {str(index * stride): float(sigma) for index, sigma in enumerate(calibration.sigmas)}
    for index, step in progress(list(enumerate(sigma_map)), "timesteps"):
        if array_name(step) in ledger.files and index_name(step) in ledger.files:
            continue
        at_step = replace(
            calibration, sigmas=calibration.sigmas[index : index + 1], latents=calibration.latents[index : index + 1]
        )
        where = f"step {step} (sigma {sigma_map[step]:.4g})"
        seen = _run(
            adapter,
            at_step,
            paths,
            Picks.draw(rows, rows_of_image * num_images, (seed, index * stride)),
            where,
            progress,
        )
        after = {path: edge.after for edge in adapter.edges() for path in edge.consumers}
        layers = {path: {"leader": seen.leader[path], "after": after.get(path, "")} for path in paths}
        widths = {leader: len(inputs.ranges.least) for leader, inputs in seen.layers.items()}
        ledger.notes |= {
            "sigma_map": sigma_map,
            "step_keys": list(sigma_map),
            "paths": paths,
            "layers": {path: {**layer, "width": widths[layer["leader"]]} for path, layer in layers.items()},
        }
        costs = _costs(adapter, at_step, paths, SENSITIVITY_ROWS // rows_of_image, seed + index, progress)
        _write(
            ledger,
            step,
            sigma_map[step],
            seen.layers,
            {leader for leader in seen.layers if after.get(leader) == "gelu"},
            costs,
        )
        ledger.save()
    stats = ActivationStats(ledger)
    if not ledger.complete:
        draw_ranges(_curves(stats), folder / PICTURE)
        ledger.save(complete=True)
    return stats


def _run(
    adapter: DiffusionAdapter,
    calibration: Calibration,
    paths: list[str],
    picks: Picks,
    where: str,
    progress: Progress = silent,
) -> StepCollector:
    """What the layers at ``paths`` read at the one timestep of ``calibration``; ``where`` names that for the reader."""
    collector = StepCollector(picks, MOMENTUM)
    with tapped(adapter.module, paths, collector):
        for start in progress(range(0, len(calibration.prompts), adapter.batch), where):
            batch = slice(start, start + adapter.batch)
            part = replace(calibration, prompts=calibration.prompts[batch], latents=calibration.latents[:, batch])
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
    some = replace(calibration, prompts=calibration.prompts[:images], latents=calibration.latents[:, :images])
    found = measure(adapter, adapter.stages, *some.batches(adapter, adapter.batch), paths, seed, progress)
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
    """``tensor_*`` are over all channels and tokens, ``channel_*`` percentiles over channels of a channel's largest
    magnitude, and ``hist_*`` percentiles of the absolute values that the histogram counts.
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
