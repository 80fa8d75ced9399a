"""Where in the denoising path a quantized model departs: the relative error of the latents after every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from ..numerics.arrays import Array


def trajectory_error(latents: Sequence[Array], reference: Sequence[Array]) -> npt.NDArray[np.float64]:
    """``‖x−y‖ / ‖y‖`` [S,B] of the latents x [B,…] of a run after each of its S steps, y those of the reference at the
    same seeds.

    The ratio of norms is the ratio of root mean squares. Raises NumericsError on runs of other lengths or shapes, on
    values that are not finite, and on reference latents that are all zero.
    """
    if len(latents) != len(reference) or not len(latents):
        raise NumericsError(
            f"trajectory error: expected two runs of equally many steps, found {len(latents)} and {len(reference)}"
        )
    errors = [
        _step(np.asarray(x), np.asarray(y), step) for step, (x, y) in enumerate(zip(latents, reference, strict=True))
    ]
    if len({len(row) for row in errors}) > 1:
        raise NumericsError(
            f"trajectory error: the number of samples changes along the run: {[len(row) for row in errors]}"
        )
    return np.stack(errors)


def _step(x: Array, y: Array, step: int) -> npt.NDArray[np.float64]:
    if x.shape != y.shape or x.ndim < 2 or 0 in x.shape:
        raise NumericsError(
            f"trajectory error, step {step}: expected latents [B,…] of equal shape, found {x.shape} and {y.shape}"
        )
    x, y = (a.astype(np.float64).reshape(len(a), -1) for a in (x, y))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericsError(f"trajectory error, step {step}: the latents hold NaN or infinite values")
    scale = np.linalg.norm(y, axis=1)
    if not scale.all():
        raise NumericsError(
            f"trajectory error, step {step}: the reference's latents of sample {int(np.argmin(scale))} are all zero"
        )
    return np.asarray(np.linalg.norm(x - y, axis=1) / scale)
