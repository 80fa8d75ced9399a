"""Calibration data: what the model sees on its own trajectories, real prompts and real noise, at every sampler step.

Only latents are kept; text is encoded again when it is needed. Everything is a function of (model, prompts, steps,
guidance).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, CalibrationError
from ..files import checked, schema
from ..files.checked import array_digest, read_tensors, write_tensors
from ..files.kept_arrays import KeptArrays
from ..models.adapter import Adapter
from ..models.diffusion import DiffusionAdapter, diffusion
from ..models.stages import State
from ..progress import Progress, silent
from ..sampling.batches import drawn_batches
from ..sampling.guidance import FACTS, Guidance, asked, guided_rows, sides
from ..sampling.prompts import LARGEST_SEED, Prompt
from .objectives import GuidedPrediction
from .on_demand import OnDemand
from .probes import Probes, shares

KIND, LATENTS = "calibration-batch", "latents"
# Pictures whose rows follow each other where each is alone, first all with their prompt: an even share of them is held
# out with both sides, and both are in one batch of averaged min-max, which is of 32 rows.
TOGETHER = 16


def _prompt(value: Any, where: str) -> None:
    """The schema of a prompt: its seed and its text."""
    schema.array_of(schema.anything, 2, 2)(value, where)
    schema.whole(0, LARGEST_SEED)(value[0], f"{where}[0]")
    schema.text(value[1], f"{where}[1]")


HEADER = schema.every(
    schema.entries(
        {
            "model": schema.text,
            "source": schema.text,
            "prompts": schema.array_of(_prompt),
            "steps": schema.whole(1),
            "sigmas": schema.array_of(schema.number(0), 1),
        },
        {"samples": schema.maybe(schema.whole(1)), "sampler": schema.text},
    ),
    FACTS,
)


@dataclass(frozen=True)
class Origin:
    """What trajectories were drawn from: the model, ``source``, which is the fingerprint of its weights, the prompts,
    and how many steps were walked with which guidance. ``sigmas`` [steps], descending, are where latents were kept.
    """

    model: str
    source: str
    prompts: tuple[Prompt, ...]
    steps: int
    guidance: Guidance
    sigmas: npt.NDArray[np.float64]

    @property
    def cfg(self) -> float:
        """The weight of guidance."""
        return self.guidance.weight


@dataclass(frozen=True)
class Calibration(Origin):
    """``latents`` [steps, prompts, H, W, C] float32, what the model read before each step, at ``sigmas``; ``sampler``
    says how it samples where that is not a flow's usual way.

    ``samples`` limits how many (step, picture) pairs go through the model again when it is quantized (None: all of
    them); see ``take_turns``.
    """

    latents: mx.array
    samples: int | None = None
    sampler: str | None = None

    @property
    def pictures(self) -> list[list[int]]:
        """Which pictures go through the model at each step."""
        return take_turns(len(self.sigmas), len(self.prompts), self.samples)

    def part(self, *, steps: slice = slice(None), pictures: slice = slice(None)) -> Calibration:
        """The trajectories of some pictures, at some of the steps."""
        return replace(
            self, prompts=self.prompts[pictures], sigmas=self.sigmas[steps], latents=self.latents[steps][:, pictures]
        )

    @property
    def sides(self) -> int:
        """Two where guidance reads each picture with its prompt and without, and both are in one forward pass."""
        return 1 if self.guidance.alone else len(sides(self.guidance))

    @property
    def level_samples(self) -> int:
        """The most pictures that go through the model at one step; where rows are alone, the most rows."""
        return max(map(len, self.pictures)) * (len(sides(self.guidance)) if self.guidance.alone else 1)

    @property
    def trajectories(self) -> dict[str, Any]:
        """What the latents were made from, as plain data."""
        return {
            "model": self.model,
            "source": self.source,
            "prompts": [[p.seed, p.text] for p in self.prompts],
            "steps": self.steps,
            **self.guidance.facts,
            "latent_shape": list(self.latents.shape[2:]),
            **({} if self.sampler is None else {"sampler": self.sampler}),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What this data was made from, and what of it is used, as plain data."""
        return {**self.trajectories, "samples": sum(map(len, self.pictures)), "pictures": self.pictures}

    @property
    def record(self) -> dict[str, Any]:
        """All that it depends on, as plain data."""
        return self.facts | {"latents": array_digest(self.latents)}

    def judged(self, count: int) -> range:
        """All batches: few are at the same noise level."""
        return range(count)

    def renewed(self, adapter: Adapter, progress: Progress = silent, folder: Path | None = None) -> Calibration:
        """What another model draws from the same prompts; see ``collect``."""
        more = (progress, self.samples, folder, self.guidance.negative)
        return collect(diffusion(adapter), self.prompts, self.steps, self.cfg, *more)

    def batches(self, adapter: Adapter, size: int | None = None) -> tuple[list[float], OnDemand]:
        """Noise levels and chain inputs, each batch at one noise level with at most ``size`` pictures, by default as
        many as the adapter samples at once.

        Guided models see every latent with its prompt and with the empty prompt, as their sampler does: first all
        guided rows, then all others. Where rows cannot share a forward pass each is a batch by itself: those of
        ``TOGETHER`` pictures in the same order, then those of the next. Inputs are put together when they are asked
        for; each distinct prompt is encoded once.
        """
        usual = TOGETHER if self.guidance.alone else adapter.batch
        return self._states(diffusion(adapter), usual if size is None else size, False)[:2]

    def in_order(self, adapter: Adapter, size: int | None = None) -> tuple[list[float], OnDemand]:
        """As ``batches``, by default all pictures at once, with the rows picture by picture: a picture's guided and
        unguided side follow each other.
        """
        return self._states(diffusion(adapter), len(self.prompts) if size is None else size, True)[:2]

    def probes(self, adapter: Adapter, held_out: bool = False) -> Probes:
        """See ``CalibrationData``: the guided prediction counts, and each side for itself."""
        host, asked_for = diffusion(adapter), sides(self.guidance)
        used = sorted({picture for turn in self.pictures for picture in turn})
        some = {used[place] for place in shares(len(used))[held_out]}
        sigmas, states, parts = self._states(host, max(1, host.rows // self.sides), True, some)
        alone = self.guidance.alone
        prompted = [(asked_for[which],) if alone else asked_for * len(pictures) for _, pictures, which in parts]
        objective = GuidedPrediction(host, self.guidance.weight if len(asked_for) > 1 else 1.0, self.sides)
        return Probes(sigmas, states, prompted, self.sides, objective)

    def _states(
        self, adapter: DiffusionAdapter, size: int, side_by_side: bool, wanted: Container[int] | None = None
    ) -> tuple[list[float], OnDemand, list[tuple[int, list[int], int]]]:
        """Noise levels and chain inputs, and what each is of: step, pictures, and which of the passes that guidance
        asks for; of the ``wanted`` pictures alone where it says so.
        """
        guidance = self.guidance
        if (guidance.kind, guidance.alone) != (adapter.guidance, adapter.alone):
            raise CalibrationError(
                f"these trajectories are of a model with guidance {guidance.kind}{', alone' * guidance.alone};"
                f" {adapter.name} has {adapter.guidance}{', alone' * adapter.alone}: calibrate anew"
            )
        parts = list[tuple[int, list[int], int]]()
        for step, turn in enumerate(self.pictures):
            pictures = [picture for picture in turn if wanted is None or picture in wanted]
            for start in range(0, len(pictures), size):
                some = pictures[start : start + size]
                if guidance.alone:
                    rows = guided_rows(some, guidance, side_by_side)
                    parts += [(step, [picture], sides(guidance).index(prompted)) for picture, prompted in rows]
                else:
                    parts.append((step, some, 0))
        used = sorted({picture for _, some, _ in parts for picture in some})
        texts = list(dict.fromkeys(self.prompts[picture].text for picture in used))
        places = {text: place for place, text in enumerate(texts)}
        text, other = adapter.both_sides(texts, guidance)

        def make(index: int) -> State:
            step, some, which = parts[index]
            read = mx.array([places[self.prompts[picture].text] for picture in some])
            latents = self.latents[step][mx.array(some)]
            latent, conditioning = asked(latents, text.take(read), other.take(read), guidance, side_by_side)[which]
            return adapter.state(latent, conditioning, float(self.sigmas[step]))

        return [float(self.sigmas[step]) for step, _, _ in parts], OnDemand(make, range(len(parts))), parts

    def save(self, path: Path) -> None:
        write_tensors(path, "calibration", {"latents": self.latents}, {**self.facts, "sigmas": self.sigmas.tolist()})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises ArtifactError when the file is damaged or foreign."""
        arrays, header = read_tensors(path, "calibration", schema=HEADER)
        if "latents" not in arrays or arrays["latents"].shape[:2] != (len(header["sigmas"]), len(header["prompts"])):
            raise ArtifactError(f"{path}: holds no latents for its prompts at its noise levels; write it anew")
        prompts = tuple(Prompt(seed, text) for seed, text in header["prompts"])
        made, sigmas = (
            (header["model"], header["source"], prompts, header["steps"], Guidance.of(header)),
            np.array(header["sigmas"]),
        )
        # what was saved before there was a limit, or another sampler, has none
        return cls(*made, sigmas, arrays["latents"], header.get("samples"), header.get("sampler"))


def take_turns(steps: int, pictures: int, samples: int | None = None) -> list[list[int]]:
    """Which of ``pictures`` to use at each of ``steps``, ``samples`` pairs in all (None: all pairs).

    Every step has as many as any other, to within one, and at least one, even where ``samples`` is less than ``steps``.
    Pictures take turns from step to step: each is used as often as any other, to within one.
    """
    total = steps * pictures if samples is None else min(max(samples, steps), steps * pictures)
    edges = [step * total // steps for step in range(steps + 1)]
    return [sorted(turn % pictures for turn in range(*edge)) for edge in pairwise(edges)]


def collect(
    adapter: DiffusionAdapter,
    prompts: Sequence[Prompt],
    steps: int,
    cfg: float,
    progress: Progress = silent,
    samples: int | None = None,
    folder: Path | None = None,
    negative: str | None = None,
) -> Calibration:
    """Run the full-precision sampler over prompts, ``adapter.batch`` at a time, and keep every latent.

    With ``folder`` every finished batch is kept there in a file of its own, in the place of another job's: a killed run
    draws only what is missing and ends with the same data, bit for bit. ``samples`` is as in ``Calibration``. Raises
    CalibrationError without prompts or samples, NumericsError on NaN weights, AdapterError on an impossible
    guidance, ArtifactError when a file is damaged.
    """
    if not prompts:
        raise CalibrationError("calibration needs at least one prompt")
    if samples is not None and samples < 1:
        raise CalibrationError(f"calibration needs at least one sample, found a limit of {samples}; None takes all")
    guidance = adapter.guiding(cfg, negative)
    sigmas, nothing = adapter.sigmas(steps)[:-1], mx.zeros((steps, 0, *adapter.latent_shape))
    made = (adapter.name, adapter.fingerprint, tuple(prompts), steps, guidance)
    whole = Calibration(*made, sigmas, nothing, samples, adapter.sampler)
    starts = range(0, len(prompts), adapter.batch)
    kept = {start: _kept(whole, start, adapter.batch, folder) for start in starts}
    drawn = {start: _drawn(file, whole, start) for start, file in kept.items() if file is not None}
    latents = {start: found for start, found in drawn.items() if found is not None}
    if missing := [start for start in starts if start not in latents]:
        adapter.check_finite()
    wanted = (adapter, prompts, steps, guidance.weight, progress, "calibration")
    for batch in drawn_batches(*wanted, starts=missing, latents=True, negative=guidance.negative):
        start = batch.places.start
        latents[start] = mx.stack(batch.latents)
        mx.eval(latents[start])
        if (file := kept[start]) is not None:
            file.save({LATENTS: latents[start]})
    together = mx.concatenate([latents.pop(start) for start in starts], axis=1)
    mx.eval(together)
    return replace(whole, latents=together)


def _drawn(file: KeptArrays, whole: Calibration, start: int) -> mx.array | None:
    """The latents that a file keeps of the batch of ``whole`` that begins at prompt ``start``; None where it has none.

    Raises ArtifactError where they are not of that batch.
    """
    if (found := file.load()) is None:
        return None
    steps, _, *rest = whole.latents.shape
    latents = found[0].get(LATENTS)
    if latents is None or latents.ndim != 5 or (latents.shape[0], *latents.shape[2:]) != (steps, *rest):
        raise ArtifactError(f"{file.path}: holds no latents of {steps} steps of this model; remove it")
    if latents.shape[1] > len(whole.prompts) - start or latents.dtype != mx.float32:
        raise ArtifactError(f"{file.path}: holds latents of more pictures or in another dtype; remove it")
    return latents


def _kept(whole: Calibration, start: int, batch: int, folder: Path | None) -> KeptArrays | None:
    """Where ``folder`` keeps the latents of the batch of ``whole`` that begins at prompt ``start``."""
    if folder is None:
        return None
    part = replace(whole, prompts=whole.prompts[start : start + batch])
    job = checked.digest([part.trajectories, checked.versions()])
    return KeptArrays(folder / f"{start:04d}.safetensors", KIND, job, "its pictures are then drawn again")
