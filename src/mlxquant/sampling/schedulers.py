"""Schedulers: flow Euler, Euler, Euler ancestral, DDIM, DPM-Solver++.

A scheduler says which noise levels a sampler visits, with which numbers it steps between them (``walk``), and what a
model is told of a level. Values are those of the classes of diffusers 0.42 that are named in each docstring, for the
same predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..numerics.arrays import Array
from .parameterizations import EPSILON, FLOW, SAMPLE
from .schedules import (
    COSINE,
    KARRAS,
    LEADING,
    LINSPACE,
    TRAILING,
    Sigmas,
    Training,
    check_steps,
    flow_sigmas,
    noise_level,
    resampled,
    shifted,
    spaced,
)
from .walk import Walk


class Scheduler(Protocol):
    """Which noise levels a sampler visits, how it steps between them, and what a model is told of a level."""

    def walk(self, steps: int) -> Walk:
        """The numbers of all steps.

        Args:
            steps: How many. A walk has fewer where it begins later, and more where one is taken in several.

        Raises:
            AdapterError: No steps, or more than the model was trained at.
        """
        ...

    def time(self, level: npt.ArrayLike) -> Array:
        """The timestep that a model is told at noise levels in [0,1], float32 in the shape of ``level``."""
        ...

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """The noise level in [0,1] of timesteps that a model is told, in the shape of ``time``: for whoever sees the
        calls of a model alone, such as ``time=`` of ``mlxquant.quantize_module``.
        """
        ...


def _euler(alphas: Sigmas, sigmas: Sigmas, kind: str, along: Sigmas, scales: Sigmas, start: float) -> Walk:
    """Straight steps: ``latent + prediction (along[i+1] - along[i])``."""
    n = len(along) - 1
    return Walk(alphas, sigmas, kind, np.ones(n), np.diff(along), np.zeros((n, 0)), np.zeros(n), scales, start)


@dataclass(frozen=True)
class FlowEuler:
    """Euler steps along a rectified flow: SD3's sampler; FlowMatchEulerDiscreteScheduler.

    Attributes:
        shift: Of the noise levels, see ``schedules.shifted``.
        trained: How many timesteps the model was trained at; it is told t = trained · sigma.
        grid: "karras" or "exponential" in place of even spacing; see ``schedules.resampled``.
    """

    shift: float = 1.0
    trained: int = 1000
    grid: str | None = None

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``."""
        sigmas = flow_sigmas(steps, self.shift, self.trained)
        if self.grid is not None:
            sigmas = np.append(resampled(sigmas[:-1], self.grid, steps), 0.0)
        return _euler(1 - sigmas, sigmas, FLOW, sigmas, np.ones(steps + 1), 1.0)

    def time(self, level: npt.ArrayLike) -> Array:
        """See ``Scheduler``."""
        return np.float32(self.trained) * np.asarray(level, np.float32)

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """See ``Scheduler``."""
        return np.asarray(time, np.float64) / self.trained


def _rounded(sigmas: Sigmas) -> Sigmas:
    """To float32 values, which is what diffusers walks. With them the rest can be compared to the last digits."""
    return sigmas.astype(np.float32).astype(np.float64)


def _ratio(level: npt.ArrayLike) -> Sigmas:
    """Noise per image at a level."""
    share = np.asarray(level, np.float64)
    with np.errstate(divide="ignore"):
        return share / (1 - share)


@dataclass(frozen=True)
class Euler:
    """Euler steps of the probability flow in noise per image (arXiv 2206.00364, algorithm 1 without its second order);
    EulerDiscreteScheduler.

    Its latents explode: they are ``image + sigma noise``, and what the model reads is that over ``sqrt(1 + sigma²)``.

    Attributes:
        training: The levels that the model was trained at.
        spacing: See ``schedules.spaced``.
        offset: See there.
        grid: "karras" or "exponential" in place of even spacing; see ``schedules.resampled``.
        least: The last noise per image of such a grid; None for that of the spaced timesteps.
        most: The first.
        to_zero: Whether the walk ends at the image; else at the least level of training.
    """

    training: Training = field(default_factory=Training)
    spacing: str = LINSPACE
    offset: int = 0
    grid: str | None = None
    least: float | None = None
    most: float | None = None
    to_zero: bool = True

    def sigmas(self, steps: int) -> Sigmas:
        """Noise per image [steps+1], descending."""
        check_steps(steps)
        times = spaced(len(self.training), steps, self.spacing, self.offset).astype(np.float32)  # as the model is told
        sigmas = self.training.at(times)
        if self.grid is not None:
            sigmas = resampled(sigmas, self.grid, steps, self.least, self.most)
        return _rounded(np.append(sigmas, 0.0 if self.to_zero else self.training.sigmas[0]))

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``."""
        sigmas = self.sigmas(steps)
        scales, most = 1 / np.sqrt(1 + sigmas**2), float(sigmas.max())
        start = most if self.spacing in (LINSPACE, TRAILING) else (most**2 + 1) ** 0.5
        return _euler(scales, sigmas * scales, EPSILON, sigmas, scales, start)

    def time(self, level: npt.ArrayLike) -> Array:
        """See ``Scheduler``; with fractions."""
        return self.training.times(_ratio(level), logarithmic=self.grid is not None).astype(np.float32)

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """See ``Scheduler``."""
        return noise_level(1.0, self.training.at(time, logarithmic=self.grid is not None))


@dataclass(frozen=True)
class EulerAncestral(Euler):
    """Euler steps that go too far down and add noise to come back; EulerAncestralDiscreteScheduler, which knows no
    other grids and always ends at the image.
    """

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``."""
        walk, sigmas = super().walk(steps), self.sigmas(steps)
        here, there = sigmas[:-1], sigmas[1:]
        up = np.sqrt(there**2 * (here**2 - there**2) / here**2)
        down = np.sqrt(there**2 - up**2)
        return Walk(
            walk.alphas, walk.sigmas, EPSILON, walk.carry, down - here, walk.before, up, walk.scales, walk.start
        )


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (arXiv 2010.02502, eq. 12); DDIMScheduler.

    As there, a step leads to ``T // steps`` timesteps below, wherever the next one begins: the two are the same where
    ``steps`` divides T and spacing is not "linspace".

    Attributes:
        training: The levels that the model was trained at.
        spacing: See ``schedules.spaced``; fractions are rounded.
        offset: See there.
        to_zero: Whether the walk ends at the image; else at the least level of training.
        clip: See ``Walk``.
        eta: How much of the noise of a random step is added, 0 for none and 1 for DDPM's.
    """

    training: Training = field(default_factory=Training)
    spacing: str = LEADING
    offset: int = 0
    to_zero: bool = True
    clip: float | None = None
    eta: float = 0.0

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``."""
        check_steps(steps)
        times = spaced(len(self.training), steps, self.spacing, self.offset).round().astype(int)
        check_times(times, self.training)
        last = 1.0 if self.to_zero else self.training.alpha_bars[0]
        bars = np.append(self.training.alpha_bars[times], last)
        below = times - len(self.training) // steps
        after = np.where(below >= 0, self.training.alpha_bars[np.maximum(below, 0)], last)
        alphas, sigmas, here = np.sqrt(bars), np.sqrt(1 - bars), bars[:-1]
        fresh = self.eta * np.sqrt((1 - after) / (1 - here) * (1 - here / after))
        # the noise that was predicted is (latent - alpha image) / sigma
        carry = np.sqrt(1 - after - fresh**2) / sigmas[:-1]
        image, apart = np.sqrt(after), -carry * alphas[:-1]
        still, ones = np.zeros((len(times), 0)), np.ones(len(times) + 1)
        if self.clip is None:
            return Walk(alphas, sigmas, SAMPLE, carry, image + apart, still, fresh, ones)
        return Walk(alphas, sigmas, SAMPLE, carry, image, still, fresh, ones, 1.0, self.clip, apart)

    def time(self, level: npt.ArrayLike) -> Array:
        """See ``Scheduler``; whole."""
        return self.training.nearest(level).astype(np.float32)

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """See ``Scheduler``."""
        return np.interp(np.asarray(time, np.float64), np.arange(len(self.training)), self.training.levels)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ (arXiv 2211.01095), multistep, of order 1 or 2; DPMSolverMultistepScheduler.

    Attributes:
        training: The levels that the model was trained at.
        spacing: See ``schedules.spaced``; fractions are rounded.
        offset: See there.
        order: 2 (algorithm 2, "2M"), or 1, which is DDIM.
        heun: How the second order is computed: by the exact integral of a linear prediction, else at its midpoint.
        random: Whether steps add noise (SDE-DPM-Solver++, eq. 18 and 19).
        lower_order_final: Whether the last step of a walk of fewer than 15 is of order 1.
        euler_at_final: Whether it is in any walk. One that ends at the image always is.
        grid: "karras" or "exponential" in place of even spacing; see ``schedules.resampled``.
        flow_shift: Walks a rectified flow, shifted so, in place of the levels of ``training``, of which only the number
            then counts; None for those.
        to_zero: Whether the walk ends at the image; else at the least level of training.
        least_log: The least ``ln(alpha / sigma)`` where a walk may begin; cosine schedules have some that are too
            noisy.
    """

    training: Training = field(default_factory=Training)
    spacing: str = LINSPACE
    offset: int = 0
    order: int = 2
    heun: bool = False
    random: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    grid: str | None = None
    flow_shift: float | None = None
    to_zero: bool = True
    least_log: float = -np.inf

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise AdapterError(f"DPM-Solver++ of order {self.order}; expected 1 or 2")

    def _levels(self, steps: int) -> tuple[Sigmas, Sigmas]:
        """Alphas and sigmas [n+1]."""
        last = 0.0 if self.to_zero else self.training.sigmas[0]
        if self.flow_shift is not None:
            sigmas = shifted(1 - np.linspace(1, 1 / len(self.training), steps + 1), self.flow_shift)[::-1]
            sigmas = _rounded(np.append(sigmas[:-1], last))
            return 1 - sigmas, sigmas
        ratios = _rounded(np.append(self._ratios(steps), last))
        alphas = 1 / np.sqrt(1 + ratios**2)
        return alphas, ratios * alphas

    def _ratios(self, steps: int) -> Sigmas:
        """Noise per image [n]."""
        own = self.training.sigmas
        if self.grid is not None:
            return resampled(own[::-1], self.grid, steps)
        below = int((np.log(own) <= -self.least_log).sum())
        if self.spacing == TRAILING:
            times = spaced(len(own), steps, TRAILING, last=below)
        else:
            times = spaced(len(own), steps + 1, self.spacing, self.offset, below)[:-1].round()
        return self.training.at(times)

    def walk(self, steps: int) -> Walk:
        """See ``Scheduler``."""
        check_steps(steps)
        alphas, sigmas = self._levels(steps)
        n = len(alphas) - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(alphas) - np.log(sigmas)
            h = np.diff(logs)
            rate = 2 * h if self.random else h
            taken = -np.expm1(-rate)  # share of the way to the image
            slope = (1 - taken / rate if self.heun else taken / 2) * alphas[1:] * h / np.append(1.0, h[:-1])
        carry, now, before = sigmas[1:] / sigmas[:-1], alphas[1:] * taken, np.zeros(n)
        if self.order == 2:
            second = np.arange(n) > 0
            second[-1] &= not (self.euler_at_final or self.to_zero or (self.lower_order_final and n < 15))
            second &= h > 0  # a step to where it stands
            now, before = np.where(second, now + slope, now), np.where(second, -slope, before)
        fresh = np.zeros(n)
        if self.random:
            carry, fresh = carry * np.exp(-h), sigmas[1:] * np.sqrt(taken)
        return Walk(alphas, sigmas, SAMPLE, carry, now, before[:, None], fresh, np.ones(n + 1))

    def time(self, level: npt.ArrayLike) -> Array:
        """See ``Scheduler``; whole. Other grids lie between timesteps: of those diffusers takes the one below, but the
        nearest on Karras' grid unless the schedule is a cosine.
        """
        if self.flow_shift is not None:
            times, nearest = np.asarray(level, np.float64) * len(self.training), False
        else:
            times = self.training.times(_ratio(level), logarithmic=self.grid is not None)
            nearest = self.grid is None or (self.grid == KARRAS and self.training.schedule != COSINE)
        return (times.round() if nearest else np.floor(times + 1e-4)).astype(np.float32)

    def level(self, time: npt.ArrayLike) -> Sigmas:
        """See ``Scheduler``; where timesteps are rounded, of what is left of them."""
        if self.flow_shift is not None:
            return np.asarray(time, np.float64) / len(self.training)
        return noise_level(1.0, self.training.at(time, logarithmic=self.grid is not None))


def check_times(times: npt.NDArray[np.int_], training: Training) -> None:
    """Raise AdapterError on a timestep that the model was not trained at."""
    if len(times) and times[0] >= len(training):
        raise AdapterError(f"timestep {times[0]} of a model that was trained at {len(training)}; take a smaller offset")
