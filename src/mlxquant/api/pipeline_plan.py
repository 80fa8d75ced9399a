"""What quantizing a pipeline would write and take: bytes, memory and time by component, and where they come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from ..sweep.estimate import Work
from .pipelines import aligned, gigabytes, millions


@dataclass(frozen=True)
class ComponentPlan:
    """What would become of a component.

    Attributes:
        name: As mflux calls it.
        recipe: The name of its recipe; "" where it stays as it is.
        weights: How many numbers its parameters are.
        before: Bytes in 16 bits.
        after: Bytes of what would be written.
        loaded: Bytes in memory, in the precision in which it is loaded.
        drawing: Operations of its calls while all prompts are drawn.
        calls: How many of its calls are kept.
        kept: Bytes of those, in memory.
        work: What its sweep takes.
    """

    name: str
    recipe: str
    weights: int
    before: int
    after: int
    loaded: int
    drawing: int = 0
    calls: int = 0
    kept: int = 0
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class PipelinePlan:
    """What ``quantize_pipeline`` would do, a row a component; prints as a table, and where its numbers come from.

    Attributes:
        components: The rows.
        model: Which model, and where its weights are.
        drawn: What it would be calibrated on, in words.
        process: Bytes of this process before it holds any weights.
        rates: Operations a second, of forward passes and on matrices; None where they were not measured.
    """

    components: tuple[ComponentPlan, ...]
    model: str
    drawn: str
    process: int
    rates: tuple[float, float] | None = None

    @property
    def loaded(self) -> int:
        """Bytes of all weights in memory."""
        return sum(one.loaded for one in self.components)

    @property
    def peaks(self) -> list[int]:
        """The most bytes in memory at a time, component by component: those before it are quantized already, and have
        given back what they were; kept calls stay to the end.
        """
        kept = self.process + sum(one.kept for one in self.components)
        places = range(len(self.components))
        done = [sum(one.after for one in self.components[:place]) for place in places]
        ahead = [sum(one.loaded for one in self.components[place:]) for place in places]
        return [kept + done[place] + ahead[place] + self.components[place].work.nbytes for place in places]

    @property
    def peak(self) -> int:
        """The most bytes in memory at a time."""
        return max(self.peaks)

    @property
    def largest(self) -> ComponentPlan:
        """The component that takes the most."""
        return self.components[self.peaks.index(self.peak)]

    def seconds(self, one: ComponentPlan) -> float:
        """How long a component takes, without the drawing; needs ``rates``."""
        assert self.rates is not None
        return one.work.forward / self.rates[0] + one.work.matrices / self.rates[1]

    @property
    def drawing_seconds(self) -> float:
        """How long the drawing takes that is recorded, decoders left out; needs ``rates``."""
        assert self.rates is not None
        return sum(one.drawing for one in self.components) / self.rates[0]

    @property
    def uncounted(self) -> str:
        """What takes time beyond that."""
        return ", ".join(dict.fromkeys(one.work.uncounted for one in self.components if one.work.uncounted))

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        facts: dict[str, Any] = {"model": self.model, "calibration": self.drawn, "peak_bytes": self.peak}
        facts["components"] = [asdict(one) for one in self.components]
        if self.rates is not None:
            facts["operations_per_second"] = {"forward": self.rates[0], "matrices": self.rates[1]}
            facts["seconds"] = self.drawing_seconds + sum(map(self.seconds, self.components))
        return facts

    def told_of_memory(self, memory: int) -> str:
        """One line on a machine with so many bytes of memory, whether they suffice or not."""
        try:
            return self.require_memory(memory) or f"memory: {gigabytes(memory)} GB here, which suffices"
        except AdapterError as error:
            return str(error)

    def require_memory(self, memory: int) -> str:
        """What to say of a machine with so many bytes of memory: "" where they suffice.

        Raises:
            AdapterError: The weights alone do not fit.
        """
        if self.loaded > memory:
            raise AdapterError(
                f"{self.model}: its weights take {gigabytes(self.loaded)} GB in memory, and this machine has"
                f" {gigabytes(memory)} GB; quantize it on a larger one: the folder that is written takes"
                f" {gigabytes(sum(one.after for one in self.components))} GB, and runs here"
            )
        if self.peak <= memory:
            return ""
        most = self.largest
        fewer = most.work.streams > most.work.nbytes / 2
        hint = "fewer --samples or a smaller --size take less" if fewer else "a larger machine writes the same folder"
        return (
            f"{most.name} will take some {gigabytes(self.peak)} GB of memory, by arithmetic, and this machine has"
            f" {gigabytes(memory)} GB: it will swap, and be slow; {hint}"
        )

    def __str__(self) -> str:
        timed = self.rates is not None
        rows = [("component", "recipe", "parameters", "GB before", "GB after", "peak GB", *(["time"] if timed else []))]
        for one, peak in zip(self.components, self.peaks, strict=True):
            sizes = millions(one.weights), gigabytes(one.before), gigabytes(one.after)
            works = one.work.nbytes > 0
            rows.append(
                (one.name, one.recipe or "kept", *sizes, gigabytes(peak) if works else "")
                + ((_time(self.seconds(one)) if works else "",) if timed else ())
            )
        if timed and self.drawing_seconds:
            rows.append(("drawing", self.drawn, "", "", "", "", _time(self.drawing_seconds)))
        sums = [sum(getattr(one, name) for one in self.components) for name in ("weights", "before", "after")]
        total = (_time(self.drawing_seconds + sum(map(self.seconds, self.components))),) if timed else ()
        everything = millions(sums[0]), gigabytes(sums[1]), gigabytes(sums[2]), gigabytes(self.peak)
        rows.append(("all", "", *everything, *total))
        return "\n".join([aligned(rows), *self._reasons()])

    def _reasons(self) -> list[str]:
        """Where the numbers come from."""
        most, work, kept = self.largest, self.largest.work, sum(one.kept for one in self.components)
        place = self.components.index(most)
        weights = sum(one.after for one in self.components[:place]) + sum(one.loaded for one in self.components[place:])
        reasons = [
            f"arithmetic, from the headers of {self.model} and the shapes of one drawing that was not computed",
            f"peak: weights {gigabytes(weights)} GB, calls {gigabytes(kept)}, process {gigabytes(self.process)};"
            f" of {most.name} hidden states {gigabytes(work.streams)}, moments {gigabytes(work.moments)},"
            f" rounding {gigabytes(work.rounding)}",
        ]
        if self.rates is not None:
            drawing, forward, matrices = (
                sum(of(one) for one in self.components)
                for of in (lambda one: one.drawing, lambda one: one.work.forward, lambda one: one.work.matrices)
            )
            reasons.append(
                f"time: {_tera(drawing)} of drawing and {_tera(forward)} of forward passes at {_tera(self.rates[0])}/s"
                f" (MLX on the {mx.default_device().type.name}, measured now), {_tera(matrices)} of moments and"
                f" rounding at {_tera(self.rates[1])}/s (NumPy, measured now)"
            )
            if self.uncounted:
                reasons.append(f"not counted, so it will take longer: {self.uncounted}")
        return reasons


def _time(seconds: float) -> str:
    """In the largest unit of which there is one."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.2f} T"
