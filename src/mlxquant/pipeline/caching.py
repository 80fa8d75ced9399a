"""Replay trajectories and write what blocks write: the folder that ``block_cache`` reads.

What it weighs is found out by one forward pass before anything is written, so that a disk that is too small is told at
once and not after an hour.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..calibration.trajectories import Calibration
from ..errors import AdapterError, ArtifactError, NumericsError
from ..files import checked
from ..models.adapter import hooked
from ..models.diffusion import DiffusionAdapter
from ..models.stages import State, tensors
from ..numerics.arrays import Array
from ..progress import Progress, silent
from ..sampling.guidance import guided_rows
from .block_cache import COMMAND, KIND, METADATA, BlockCache, chosen, kept_tokens, pick
from .ledger import Ledger
from .samples import MANIFEST, Samples, sample_name

ARRAY_ALLOWANCE = 600  # bytes of npz headers for each array
FILE_ALLOWANCE = 4096 + 128  # a file's last disk block and its ledger line

Trace = dict[str, tuple[State, State]]  # by block: what it read and what it wrote


@dataclass(frozen=True)
class Plan:
    """A cache that is not written yet: its facts, the trajectories to replay and the disk that it takes, beside that of
    the layout that keeps every block's inputs and outputs and the conditioning of every step.
    """

    facts: dict[str, Any]
    trajectories: Calibration
    disk_bytes: int
    full_bytes: int


def plan(
    adapter: DiffusionAdapter, samples: Samples, num_images: int, stride: int, tokens: int | None = None, seed: int = 0
) -> Plan:
    """Find out, by one forward pass, what a cache of these samples holds and weighs.

    ``tokens`` is how many of each stream's tokens are kept (None: an eighth, at least 4; 0: all), drawn from ``seed``.
    Raises CalibrationError when the samples are of other weights or fewer than wanted.
    """
    samples.check(adapter)
    trajectories = samples.calibration(num_images, stride)
    one = trajectories.part(steps=slice(1), pictures=slice(1))
    (sigma,), (state,) = one.batches(adapter)
    traced = trace(adapter, sigma, state)
    lengths = dict[str, int]()
    for name, (inputs, outputs) in traced.items():
        for key in tensors(outputs, inputs):
            if lengths.setdefault(key, length := outputs[key].shape[1]) != length:
                raise AdapterError(
                    f"{adapter.name}: block {name} writes a stream {key!r} of {length} tokens, and others one of"
                    f" {lengths[key]}; streams that are cached keep their length: give them other names by length"
                )
    facts = {
        "model": samples.model,
        "source": samples.source,
        "parents": {MANIFEST: samples.sha256},
        "num_images": num_images,
        "stride": stride,
        "sigmas": trajectories.sigmas.tolist(),
        **samples.guidance.facts,
        "batch": adapter.batch,
        "blocks": list(traced),
        "tokens": {stream: [kept_tokens(length, tokens), length] for stream, length in sorted(lengths.items())},
        "seed": seed,
        "dtype": "float16",
        "versions": checked.versions(),
    }
    kept = entries(traced, chosen(facts["tokens"], seed, range(1), 0))
    count = num_images * len(trajectories.sigmas)
    own = sum(2 * value.size for value in kept.values()) + ARRAY_ALLOWANCE * len(kept) + FILE_ALLOWANCE
    streams = [side[key] for pair in traced.values() for side in pair for key in lengths if key in side]
    theirs = sum(2 * value.size for value in streams) + 4 * sum(
        value.size for name, value in state.items() if name not in ("latent", "t")
    )
    return Plan(facts, trajectories, count * own, count * theirs)


def trace(adapter: DiffusionAdapter, sigma: float, state: State) -> Trace:
    """What every block reads and writes in one forward pass, all blocks at once and not evaluated yet.

    Raises AdapterError when the model's forward pass does not go through its blocks' hooks.
    """
    names = [stage.name for stage in adapter.blocks]
    seen: Trace = {}

    def observe(name: str, inputs: State, outputs: State) -> None:
        seen[name] = (inputs, outputs)

    with hooked(adapter, names, observe):
        adapter.run(state, sigma)
    if list(seen) != names:
        missed = [name for name in names if name not in seen]
        raise AdapterError(
            f"{adapter.name}: blocks {missed} were not reached in a forward pass; its forward pass must run every"
            " stage's hook"
        )
    return seen


def entries(traced: Trace, tokens: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays to keep under their names in a sample's file: ``mmI__KEY`` of block I."""
    kept = {}
    for index, (inputs, outputs) in enumerate(traced.values()):
        for key in tensors(outputs, inputs):
            rows = outputs[key].shape[0] // tokens[key].shape[0]
            kept[f"mm{index}__{key}"] = pick(outputs[key], mx.concatenate([tokens[key]] * rows))
    return kept


def write(
    plan: Plan,
    adapter: DiffusionAdapter,
    folder: Path,
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
) -> BlockCache:
    """Replay the trajectories and write the folder, one batch of images at one step in memory at a time.

    A killed run goes on where it was and ends with the same bytes. Raises ArtifactError when the disk is too small or
    the folder holds another cache and ``force`` is not given, NumericsError when a value does not fit float16.
    """
    if (folder / MANIFEST).exists():
        raise ArtifactError(f"{folder}: holds the trajectories themselves; give the cache a folder of its own")
    ensure_space(folder, plan.disk_bytes)
    ledger = Ledger.open(folder / METADATA, KIND, plan.facts, COMMAND, force, resume)
    if not ledger.complete:
        adapter.prepare(plan.trajectories.prompts, plan.trajectories.guidance.negative)
        with ledger.same_blas():
            for start in range(0, len(plan.trajectories.prompts), adapter.batch):
                _write_images(plan, adapter, ledger, start, progress)
        ledger.save(complete=True)
    return BlockCache.read(folder)


def ensure_space(folder: Path, needed: int) -> None:
    """Raise ArtifactError when the disk under ``folder`` has not ``needed`` bytes free, counting what an earlier run
    left there.
    """
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    present = sum(path.stat().st_size for path in folder.glob("samples/*.npz"))
    free = shutil.disk_usage(disk).free
    if needed > free + present:
        raise ArtifactError(
            f"{folder}: the cache needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free there; "
            "free some space, choose another disk, or keep fewer --tokens, --num-images or a larger --stride"
        )


def _write_images(plan: Plan, adapter: DiffusionAdapter, ledger: Ledger, start: int, progress: Progress) -> None:
    """The samples of one batch of images, step by step, where they are not there yet."""
    calibration, stride = plan.trajectories, plan.facts["stride"]
    part = calibration.part(pictures=slice(start, start + adapter.batch))
    images = range(start, start + len(part.prompts))
    names = [[sample_name(image, index * stride) for image in images] for index in range(len(part.sigmas))]
    if all(name in ledger.files for step in names for name in step):
        return
    label = f"block outputs, images {images[0]} to {images[-1]}"
    numbers = [index * stride for index in range(len(part.sigmas))]
    sigmas, states = part.batches(adapter)
    for index, (number, step) in enumerate(progress(list(zip(numbers, names, strict=True)), label)):
        if all(name in ledger.files for name in step):
            continue
        tokens = chosen(plan.facts["tokens"], plan.facts["seed"], images, number)
        arrays = half(
            entries(trace(adapter, sigmas[index], states[index]), tokens),
            plan.facts["blocks"],
            f"{step[0]} to {step[-1]}",
        )
        pictures = np.array([picture for picture, _ in guided_rows(images, part.guidance)])
        for image, name in zip(images, step, strict=True):
            ledger.add_npz(name, {key: value[pictures == image] for key, value in arrays.items()})
        ledger.save()


def half(arrays: dict[str, mx.array], blocks: list[str], where: str) -> dict[str, Array]:
    """Arrays in float16, all evaluated at once; raises NumericsError, naming block and stream, where a value does not
    fit.
    """
    halves = {name: value.astype(mx.float16) for name, value in arrays.items()}
    mx.eval(halves)
    found = {name: np.array(value) for name, value in halves.items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            largest = float(np.array(mx.abs(arrays[name].astype(mx.float32)).max()))
            source, stream = name.split("__", 1)
            raise NumericsError(
                f"{where}: the output of block {blocks[int(source[2:])]}, stream {stream!r}, reaches {largest:.4g}, and"
                " float16 ends at 65504; this model cannot be cached, 'mlxquant quantize' calibrates it without a"
                " cache"
            )
    return found
