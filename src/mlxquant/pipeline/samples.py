"""The trajectories that both tracks of the pipeline start from: latents at every sampler step, drawn by the model
itself.

A folder of ``samples/IIII_SSS.npz`` (image, step), final ``latents/IIII.npz`` and decoded ``images/IIII.png`` under
``manifest.json``. Text conditioning is not stored: it is the bulk of a sample and a function of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..calibration.trajectories import Calibration, Origin
from ..errors import AdapterError, CalibrationError, NumericsError
from ..files import checked, schema
from ..files.checked import understood
from ..models.adapter import Adapter
from ..models.diffusion import DiffusionAdapter
from ..numerics.arrays import Array
from ..progress import Progress, silent
from ..report.comparison import save_png, to_pil
from ..sampling.batches import DrawnBatch, drawn_batches
from ..sampling.guidance import FACTS, Guidance
from ..sampling.prompts import LARGEST_SEED, Prompt
from .ledger import Ledger

KIND = "calibration-samples"
MANIFEST = "manifest.json"
COMMAND = "mlxquant generate-calibration-data"
SEED = schema.whole(0, LARGEST_SEED)
STRUCTURE = schema.every(
    schema.entries(
        {
            "model": schema.text,
            "source": schema.text,
            "prompts": schema.array_of(schema.text, 1),
            "seeds": schema.array_of(SEED, 1),
            "num_steps": schema.whole(1),
            "sigmas": schema.array_of(schema.number(0), 1),
        }
    ),
    FACTS,
)


def sample_name(image: int, step: int) -> str:
    """Where a folder keeps what belongs to one image at one sampler step."""
    return f"samples/{image:04d}_{step:03d}.npz"


@dataclass(frozen=True)
class Samples(Origin):
    """A finished folder of trajectories, one latent for each prompt and step; ``sha256`` is that of the manifest and so
    of everything in the folder.
    """

    ledger: Ledger
    sha256: str

    @classmethod
    def read(cls, folder: Path, model: str | None = None) -> Samples:
        """Raises ArtifactError when there is no manifest, or an unfinished, damaged or foreign one; CalibrationError
        when these are trajectories of another model than ``model``.
        """
        remedy = f"run '{COMMAND} --calib-dir {folder}' first"
        ledger = Ledger.read(folder / MANIFEST, KIND, remedy, STRUCTURE).require_complete(COMMAND)
        facts = ledger.facts
        if model not in (None, facts["model"]):
            raise CalibrationError(
                f"{folder} holds trajectories of {facts['model']}, --model is {model}; leave it out or draw them anew"
            )
        with understood(ledger.path, remedy):
            prompts = prompts_of(facts)
            if len(facts["sigmas"]) != facts["num_steps"]:
                raise schema.MismatchError(f"sigmas has {len(facts['sigmas'])} entries for {facts['num_steps']} steps")
        sigmas = np.array(facts["sigmas"], np.float64)
        drawn = (facts["model"], facts["source"], prompts, facts["num_steps"], Guidance.of(facts), sigmas)
        return cls(*drawn, ledger, ledger.sha256)

    def check(self, adapter: DiffusionAdapter) -> None:
        """Raise CalibrationError when these trajectories were drawn by other weights than the adapter's."""
        check_source(f"{self.ledger.path}: the trajectories", self.model, self.source, adapter)

    def calibration(self, images: int, stride: int) -> Calibration:
        """The first ``images`` prompts at every ``stride``-th step, as ``Calibration`` (its ``steps`` is the number
        walked).

        Raises CalibrationError when there are fewer images or steps, ArtifactError on a missing or damaged file.
        """
        if not 1 <= images <= len(self.prompts):
            raise CalibrationError(
                f"{self.ledger.folder}: {images} images wanted, it has {len(self.prompts)}; choose between 1 and that"
            )
        if not 1 <= stride <= self.steps:
            raise CalibrationError(
                f"{self.ledger.folder}: a stride of {stride} does not fit {self.steps} steps; choose between 1 and that"
            )
        kept = range(0, self.steps, stride)
        with understood(self.ledger.path, f"run '{COMMAND} --force'"):
            latents = np.array(
                [[self.ledger.arrays(sample_name(image, step))["x"] for image in range(images)] for step in kept]
            )
            if latents.dtype != np.float32 or latents.ndim != 5:
                raise schema.MismatchError(f"its latents are {latents.dtype} of {latents.ndim} axes in all")
        return Calibration(
            self.model,
            self.source,
            self.prompts[:images],
            self.steps,
            self.guidance,
            self.sigmas[::stride],
            mx.array(latents),
        )


def prompts_of(facts: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """The prompts that a manifest's facts name, each with its seed."""
    return tuple(Prompt(seed, text) for seed, text in zip(facts["seeds"], facts["prompts"], strict=True))


def check_source(what: str, model: str, source: str, adapter: Adapter) -> None:
    """Raise CalibrationError when ``what`` was made by another model, or by the same with other weights
    (``source``).
    """
    if model != adapter.name:
        raise CalibrationError(
            f"{what} are of model {model!r}, not of {adapter.name!r}; use that model or make them anew"
        )
    if source != (found := adapter.fingerprint):
        raise CalibrationError(
            f"{what} are of {model} with other weights (fingerprint {source[:12]}…, these weights are {found[:12]}…);"
            " make them anew"
        )


def open_folder(
    adapter: DiffusionAdapter,
    prompts: Sequence[Prompt],
    steps: int,
    cfg: float,
    seed: int,
    folder: Path,
    force: bool = False,
    resume: bool = True,
    negative: str | None = None,
) -> Ledger:
    """The ledger of a folder for these trajectories, new or to go on with; ``draw`` fills it.

    ``seed`` is recorded; each prompt brings its own. Raises ArtifactError when the folder holds other trajectories and
    ``force`` is not given, NumericsError on NaN weights, CalibrationError without prompts, AdapterError on an
    impossible guidance.
    """
    if not prompts:
        raise CalibrationError("calibration needs at least one prompt")
    if adapter.alone:
        raise AdapterError(
            f"rows of {adapter.name} cannot share a forward pass, which these steps need; use 'mlxquant quantize'"
        )
    guidance = adapter.guiding(cfg, negative)
    adapter.check_finite()
    facts = {
        "model": adapter.name,
        "source": adapter.fingerprint,
        "prompts": [p.text for p in prompts],
        "seeds": [p.seed for p in prompts],
        "num_steps": steps,
        **guidance.facts,
        "seed": seed,
        "batch": adapter.batch,
        "latent_shape": list(adapter.latent_shape),
        "sigmas": adapter.sigmas(steps)[:-1].tolist(),
        **({} if adapter.sampler is None else {"sampler": adapter.sampler}),
        "versions": checked.versions(),
    }
    return Ledger.open(folder / MANIFEST, KIND, facts, COMMAND, force, resume)


def draw(adapter: DiffusionAdapter, ledger: Ledger, progress: Progress = silent) -> Samples:
    """Sample what the folder still lacks, ``adapter.batch`` pictures at a time, always the same ones together.

    A killed run goes on after its last finished batch and ends with the same bytes. Raises NumericsError, naming image
    and step, on a latent that is not finite.
    """
    prompts, steps, guidance = prompts_of(ledger.facts), ledger.facts["num_steps"], Guidance.of(ledger.facts)
    if not ledger.complete:
        missing = [
            start
            for start in range(0, len(prompts), adapter.batch)
            for images in [range(start, min(start + adapter.batch, len(prompts)))]
            if not all(name in ledger.files for image in images for name in _names(image, steps))
        ]
        wanted = (adapter, prompts, steps, guidance.weight, progress, "trajectories")
        for batch in drawn_batches(*wanted, starts=missing, latents=True, negative=guidance.negative):
            _write_batch(adapter, ledger, batch)
            ledger.save()
        ledger.save(complete=True)
    return Samples.read(ledger.folder)


def _names(image: int, steps: int) -> list[str]:
    """Every file of one image."""
    return [*(sample_name(image, step) for step in range(steps)), f"latents/{image:04d}.npz", f"images/{image:04d}.png"]


def _write_batch(adapter: DiffusionAdapter, ledger: Ledger, batch: DrawnBatch) -> None:
    """Write the files of pictures that were drawn together; nothing is written before all their latents are known to be
    finite.
    """
    sigmas, images = ledger.facts["sigmas"], batch.places
    times = _times(adapter, np.array(sigmas))
    trajectory = [
        _finite(latent, images, f"before step {step} (sigma {sigma:.4g})")
        for step, (sigma, latent) in enumerate(zip(sigmas, batch.latents, strict=True))
    ]
    latents = _finite(batch.final, images, f"after step {len(sigmas) - 1}, the last,")
    pictures = _finite(mx.array(adapter.decode(batch.final)), images, "decoded")
    for row, image in enumerate(images):
        for step, sigma in enumerate(sigmas):
            arrays = {"x": trajectory[step][row], "timestep": times[step], "sigma": np.float32(sigma)}
            ledger.add_npz(sample_name(image, step), {name: np.asarray(value) for name, value in arrays.items()})
        ledger.add_npz(f"latents/{image:04d}.npz", {"latent": latents[row]})
        picture = f"images/{image:04d}.png"
        save_png(to_pil(pictures[row]), ledger.path_of(picture))
        ledger.add([picture])


def _times(adapter: DiffusionAdapter, sigmas: Array) -> Array:
    """What the model is told at noise levels, float32; of a flow rounded once, as these files always had it, while the
    model's own product is one of float32 numbers.
    """
    return (1000 * sigmas).astype(np.float32) if adapter.sampler is None else adapter.scheduler.time(sigmas)


def _finite(values: mx.array, images: range, when: str) -> Array:
    """values [images,...] as float32; raises NumericsError naming the first image that holds NaN or infinity."""
    found = np.array(values.astype(mx.float32))
    for row, image in enumerate(images):
        if not np.isfinite(found[row]).all():
            raise NumericsError(
                f"image {image}: its latent {when} holds NaN or infinite values; the model's weights or its text"
                " conditioning are damaged"
            )
    return found
