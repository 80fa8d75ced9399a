"""Judging models on the same prompts and seeds: who is compared, what is drawn and measured, and the report of it as
plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..api.model import QuantizedModel
from ..calibration.trajectories import Calibration
from ..errors import NumericsError
from ..files import checked, schema
from ..files.atomic import ensure_writable
from ..files.kept_arrays import KeptFacts
from ..metrics.bootstrap import interval
from ..progress import Progress
from ..recipes.citations import cited
from .contender import Contender
from .cost import MEASURED, measure_costs, sizes
from .drawings import Drawings
from .figures import Judge, PictureSet, differences
from .half_precision import half_precision
from .layer_report import PICTURES, layer_report
from .report_folder import machine

FLOOR = "float16"  # name of the reference in 16-bit arithmetic
COSTS = schema.entries({"costs": schema.array_of(schema.table_of(schema.anything))})


@dataclass(frozen=True)
class Evaluation:
    """Contenders against a reference, with everything that is finished kept in ``work``; each step takes what an
    earlier run has.
    """

    drawings: Drawings
    contenders: Sequence[Contender]
    judge: Judge
    work: Path
    progress: Progress

    @property
    def reference(self) -> Contender:
        return self.drawings.reference

    def report(self, settings: dict[str, Any], floor: bool = True) -> tuple[dict[str, Any], list[PictureSet]]:
        """Draw, measure, and say it all as the plain data of ``report.json``; and the pictures. With ``floor`` the
        noise floor is drawn too. Layer reports are left in ``work/layers``.
        """
        costs = self._costs()
        self.drawings.draw(self.contenders, self.progress)
        half = self._floor() if floor and self.reference.quantized is None else None
        everyone = [self.reference, *self.contenders, *([half] if half else [])]
        pictures = {one.name: PictureSet(one.name, one.folder, partial(self.drawings.images, one)) for one in everyone}
        facts = {one.name: self._model(one, pictures) | costs.get(one.name, {}) for one in everyone}
        reference, results = facts[self.reference.name], [facts[one.name] for one in self.contenders]
        metrics = self.judge.table(reference["accuracy"] is not None)
        for one in self.contenders:
            self._layers(one)
        prompts = [{"index": index, "seed": p.seed, "text": p.text} for index, p in enumerate(self.drawings.prompts)]
        report = {
            "source": "models",
            "settings": settings,
            "machine": machine(),
            "prompts": prompts,
            "metrics": metrics,
            "reference": reference,
            "results": results,
            "noise_floor": None if half is None else facts[half.name],
            "differences": differences(metrics, reference, results),
            "trajectory_sigma": [float(sigma) for sigma in self.drawings.sigmas],
            "measured": [*MEASURED, "seconds_quantize"],
            "notes": [*self.judge.notes, *few(len(prompts))],
            "methods": cited([one.quantized.facts["recipe"] for one in self.contenders if one.quantized is not None]),
        }
        return report, list(pictures.values())

    def _costs(self) -> dict[str, dict[str, Any]]:
        """What each model costs, by name; measured once."""
        everyone, first = [self.reference, *self.contenders], self.drawings.prompts[0]
        job = checked.digest(
            {"models": [one.source for one in everyone], **self.drawings.guidance.facts, "machine": machine()}
        )
        kept = KeptFacts(self.work / "cost.json", "cost", job)
        if (found := kept.load(COSTS)) is None:
            found = {
                "costs": measure_costs([one.model for one in everyone], first, self.drawings.guidance, self.progress)
            }
            kept.save(found)
        return {one.name: {**sizes(one.model), **cost} for one, cost in zip(everyone, found["costs"], strict=True)}

    def _floor(self) -> Contender | None:
        """The reference in 16-bit arithmetic, drawn; None, with a note, where it does not fit into float16."""
        model = half_precision(self.reference.model)
        half = Contender(FLOOR, FLOOR, model, f"float16 of {self.reference.source}")
        try:
            self.drawings.draw([half], self.progress)
        except NumericsError as error:
            self.judge.notes.append(f"There is no noise floor: in float16 the reference overflows ({error}).")
            return None
        return half

    def _model(self, one: Contender, pictures: dict[str, PictureSet]) -> dict[str, Any]:
        """One model's object in the report, without its costs."""
        exact = None if one is self.reference else pictures[self.reference.name]
        trajectory = None if exact is None else self.drawings.trajectory(one)
        return {
            **blank(one.name, one.folder),
            "recipe": one.recipe,
            "quantized": self._inside(one) is not None,
            **self.judge.score(pictures[one.name], exact, self.progress),
            "trajectory": None if trajectory is None else trajectory.mean(1).tolist(),
            "trajectory_interval": None if trajectory is None else [interval(values) for values in trajectory],
            "seconds_quantize": one.seconds,
        }

    def _inside(self, one: Contender) -> QuantizedModel | None:
        """The quantized model whose layers can be compared with the reference's, one by one; None where there
        is none.
        """
        return one.quantized if one is not self.reference and one.model.name == self.reference.model.name else None

    def _layers(self, one: Contender) -> None:
        """Write ``layers/<folder>.json`` of a quantized model, if it is not there."""
        if (quantized := self._inside(one)) is None:
            return
        path = self.work / "layers" / f"{one.folder}.json"
        kept = KeptFacts(path, "layer-report", self.drawings.job(one, 0))
        if kept.load() is not None:
            return
        ensure_writable(path.parent)
        adapter, count = (
            self.reference.model.adapter,
            min(PICTURES, len(self.drawings.prompts), self.drawings.starts.step),
        )
        some, latents = self.drawings.prompts[:count], self.drawings.latents(count)
        sigmas = self.drawings.sigmas[:-1]
        calib = Calibration(
            adapter.name, self.reference.source, some, self.drawings.steps, self.drawings.guidance, sigmas, latents
        )
        facts = layer_report(self.reference.model, quantized, calib, self.progress)
        kept.save({"model": one.name, **facts})


def blank(name: str, folder: str) -> dict[str, Any]:
    """A model's object in the report of which nothing is known but its pictures."""
    unknown = (
        "recipe",
        "accuracy",
        "accuracy_interval",
        "attributes",
        "trajectory",
        "trajectory_interval",
        "seconds_quantize",
        *MEASURED,
    )
    size = ("model_bytes", "bits_per_weight", "bits_per_quantized_weight")
    return {"name": name, "folder": folder, "quantized": False, **dict.fromkeys((*unknown, *size))}


def few(pictures: int) -> list[str]:
    """What to say of a report on so many pictures."""
    return ["One picture only: its figures have no intervals."] if pictures == 1 else []
