"""Models that predict at noise levels: what they predict, and which levels they are sampled at.

A recipe sees levels alone. What they are to the model, which timestep it is told, and what an error there costs, comes
from the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from ..errors import AdapterError
from ..numerics.arrays import Array
from ..sampling.parameterizations import FLOW, Parameterization
from ..sampling.schedulers import FlowEuler, Scheduler
from ..sampling.schedules import Sigmas
from ..sampling.walk import Walk
from .adapter import Adapter


class ScheduledAdapter(Adapter):
    """A model that is sampled by a scheduler. One whose scheduler is not the usual one says so in its class, or keeps
    it in ``describe``, so that a saved model samples alike.

    Attributes:
        shift: Of the noise levels of the usual scheduler.
        parameterization: What the model predicts.
        steps: Sampler steps where nobody says.
    """

    shift: float = 1.0
    parameterization: Parameterization = Parameterization()
    steps: int = 28
    _scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """How it samples; another may be set. Here SD3's flow Euler, shifted by ``shift``."""
        return FlowEuler(self.shift) if self._scheduler is None else self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def twin(self) -> Self:
        """See ``Adapter.twin``; it samples alike."""
        twin = super().twin()
        twin.scheduler, twin.parameterization = self.scheduler, self.parameterization
        return twin

    @property
    def sampler(self) -> str | None:
        """What trajectories depend on besides weights, prompts, steps and guidance; None for a flow's usual sampler."""
        used = (self.scheduler, self.parameterization)
        return None if used == (FlowEuler(self.shift), Parameterization()) else repr(used)

    def walk(self, steps: int) -> Walk:
        """The steps of the sampler.

        Args:
            steps: How many. The model is asked more often where a scheduler takes one of them in several.

        Raises:
            AdapterError: The scheduler takes fewer steps, or none.
        """
        walk = self.scheduler.walk(steps)
        if len(walk) < steps:
            raise AdapterError(f"{self.name}: its scheduler takes {len(walk)} steps where {steps} were asked for")
        return walk

    def sigmas(self, steps: int) -> Sigmas:
        """The ``steps + 1`` noise levels in [0,1] of the sampler, descending: those at which the model is asked, each
        once, and that of what is drawn; see ``sampling.schedules``.
        """
        levels = self.walk(steps).levels
        asked = levels[:-1]
        return np.append(asked[np.append(asked[:-1] != asked[1:], True)], levels[-1])

    def level_weights(self, sigmas: Sequence[float] | Array) -> Array:
        """What a unit of squared error of a prediction costs at noise levels [T], relative to the mean over a walk: the
        square of the step's gain, see ``Walk.weights``; [T]. For flows it is 1, see ``curvature.sensitivity``.
        """
        if self.parameterization.kind == FLOW:
            return super().level_weights(sigmas)
        return self.walk(self.steps).weights(self.parameterization, sigmas)
