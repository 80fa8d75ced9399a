"""How scales are tuned once codes are chosen: settings that a recipe holds, and nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError
from ..grids.weights import GROUPS

ITERATIONS = 300


@dataclass(frozen=True)
class Tuning:
    """How long and how hard scales are tuned, and on what.

    Args:
        iterations: Steps of Adam at most; the held-out loss may end them sooner.
        rate: Its largest step, relative to a scale; of weights of 2 bits twice that.
        batch: Samples a step: pictures at a step of the sampler, windows of text, or recorded calls.
        prompts: How many prompts' trajectories are learned from; where a calibration has fewer, the model draws more
            prompts of its own. Text and recorded calls are what the calibration has.
        held_out: The share of prompts, windows or calls that nothing is learned from.
        branches: How much the error of each side of a guided prediction counts beside that of the guided one.
        on_policy: Learn from what the quantized model draws, too, half and half; not for text and recorded calls, which
            are the same whoever reads them.
        group: Give weights with a scale a row, of less than 8 bits and read by unquantized inputs, a scale for so many
            columns; None leaves formats alone. What tools of MLX read repeats scales so anyway.
        seed: Of the draw of samples.

    Raises:
        RecipeError: A value is out of range.
    """

    iterations: int = ITERATIONS
    rate: float = 1e-3
    batch: int = 12
    prompts: int = 128
    held_out: float = 0.125
    branches: float = 0.25
    on_policy: bool = False
    group: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "iterations": self.iterations >= 0, "rate": self.rate > 0, "batch": self.batch >= 1,
            "prompts": self.prompts >= 2, "held_out": 0 < self.held_out < 1, "branches": self.branches >= 0,
            "group": self.group in (None, *GROUPS),
        }  # fmt: skip
        for name, fine in ranges.items():
            if not fine:
                raise RecipeError(f"tuned scales: {name} = {getattr(self, name)} is out of range")
