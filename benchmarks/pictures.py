"""What the benchmarks of pictures share: ``mmdit-shapes``, its held-out prompts, and the scores of another model on
them.

Pictures are compared with those of the full-precision model at the same prompt and seed.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

from mlxquant.api.model import Model
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import progress
from mlxquant.metrics.attributes import Marks, accuracy
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.psnr import psnr


class Pictures:
    """The full-precision model, held-out prompts, and what it draws of them, once.

    Args:
        num_prompts: How many held-out prompts.
        first: The number of the first of them. Whoever chooses something on prompts reports on others.
    """

    def __init__(self, num_prompts: int, first: int = 0):
        self.model = mq.load("mmdit-shapes")
        self.first, self.prompts = first, self.model.adapter.prompts("evaluation", first + num_prompts)[first:]
        self.calibration = cache(self._calibration)

    @property
    def of(self) -> dict[str, Any]:
        """What rows that are measured on these pictures are of."""
        return {
            "model": self.model.adapter.fingerprint[:8],
            "prompts": f"{self.first}-{self.first + len(self.prompts) - 1}",
        }

    @cached_property
    def reference(self) -> np.ndarray:
        """Pictures [prompts,H,W,3] in full precision."""
        return self.model.images(self.prompts, progress=progress)

    def _calibration(self, prompts: int, first: int = 0) -> Calibration:
        """The trajectories of ``prompts`` of the calibration's prompts, from number ``first`` on."""
        some = self.model.adapter.prompts("calibration", first + prompts)[first:]
        return mq.calibrate(self.model, some, progress=progress)

    def scores(self, other: Model) -> tuple[np.ndarray, dict[str, float]]:
        """PSNR in dB of each picture [prompts], and the share of attributes that they obey: of each kind and
        the mean.
        """
        images = other.images(self.prompts, progress=progress)
        return self.psnr(images), self.accuracy(images)

    def psnr(self, images: np.ndarray) -> np.ndarray:
        """In dB of each picture [prompts] against full precision."""
        return psnr(images, self.reference)

    def accuracy(self, images: np.ndarray) -> dict[str, float]:
        return accuracy(self.marks(images))

    def marks(self, images: np.ndarray) -> Sequence[Marks]:
        """What each picture obeys of its prompt."""
        found = self.model.adapter.attributes(images, [prompt.text for prompt in self.prompts])
        assert found is not None
        return found


def mean_psnr(decibels: np.ndarray) -> dict[str, Any]:
    """With its bootstrap 95 % interval."""
    return {"psnr_db": float(decibels.mean()), "psnr_95": interval(decibels)}


def machine() -> str:
    return f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, mlx {mx.__version__}"
