"""How little loss so many bits can leave: the rate-distortion limit of a weight under a quadratic loss.

The loss of a weight W [out,in] that is replaced by W - D is tr(H_O D H_I D^T): with H_I the second moments of the
layer's inputs and H_O the identity it is the squared error of its output; with both factors it is a Kronecker
approximation of a Hessian (arXiv 2505.22988). In the eigenbases of the factors it is a sum of independent squares, one
for each product of two eigenvalues. Weights are taken as independent Gaussians, each row with a variance of its own.
No code of any kind, whatever it costs to decode, then has less loss at ``bits`` a weight than reverse water-filling
(Cover and Thomas, Elements of Information Theory, theorem 10.3.3): each component has the same distortion, the water
level, or, where its variance is below that, no bits and all of its variance as distortion. A Gaussian is the hardest
source of its variances: weights that have structure beyond these can do better.

Products of eigenvalues are never written down: 38 million for a weight of 6144 x 6144. Of each row's components those
above a water level are the first so many of the sorted input eigenvalues, and sums over them are cumulative sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import NumericsError
from .arrays import Array
from .moments import energy

NEGLIGIBLE = 1e-12  # of the largest eigenvalue: below it is the rounding of a float64 decomposition


@dataclass(frozen=True)
class Spectrum:
    """The variances of a weight's components under its loss: all products of one of ``outputs`` [out] and one of
    ``inputs`` [in], both float64, descending and not negative.
    """

    outputs: Array
    inputs: Array

    @property
    def size(self) -> int:
        """How many weights there are."""
        return self.outputs.size * self.inputs.size

    @property
    def power(self) -> float:
        """The loss of leaving all of the weight away, in expectation."""
        return float(self.outputs.sum() * self.inputs.sum())


def loss(change: Array, inputs: Array, outputs: Array | None = None) -> float:
    """tr(H_O D H_I D^T) of a change D [out,in] of a weight.

    Args:
        change: [out,in].
        inputs: H_I [in,in], symmetric; its precision is that of the sum.
        outputs: H_O [out,out], symmetric; None for the identity.

    Returns:
        Never negative, up to rounding.
    """
    if outputs is None:
        return float(energy(change, inputs).sum())
    change = change.astype(inputs.dtype, copy=False)
    return float(np.vdot(outputs.astype(inputs.dtype, copy=False) @ change, change @ inputs))


def spectrum(weight: Array, inputs: Array, outputs: Array | None = None) -> Spectrum:
    """The variances of a weight's components under tr(H_O D H_I D^T), with each row's mean square for its variance.

    Args:
        weight: [out,in].
        inputs: H_I [in,in], symmetric, not negative.
        outputs: H_O [out,out], likewise; None for the identity.

    Raises:
        NumericsError: A factor is not finite, or no factor of this weight.
    """
    deviation = np.sqrt(np.square(weight, dtype=np.float64).mean(1))
    if outputs is None:
        scaled = np.sort(np.square(deviation))[::-1]
    else:
        scaled = _eigenvalues(deviation[:, None] * _factor(outputs, len(weight)) * deviation)
    return Spectrum(scaled, _eigenvalues(_factor(inputs, weight.shape[1])))


def _factor(values: Array, width: int) -> Array:
    if values.shape != (width, width) or not np.isfinite(values).all():
        raise NumericsError(
            f"a factor of shape {values.shape}, expected finite numbers of shape {(width, width)}; collect it again"
        )
    return values.astype(np.float64, copy=False)


def _eigenvalues(factor: Array) -> Array:
    """Descending; what cannot be told from zero is zero."""
    found = np.linalg.eigvalsh(factor)[::-1]
    return np.where(found > NEGLIGIBLE * max(found[0], 0), found, 0.0)


def least_loss(spectra: Sequence[Spectrum], bits: float) -> float:
    """The least loss of some weights together, in expectation, at ``bits`` a weight on average, spent where they buy
    most.

    Args:
        spectra: One a weight, or a part of one, in one unit of loss.
        bits: 0 or more.
    """
    total = 2 * bits * sum(spectrum.size for spectrum in spectra)  # in half bits, as logarithms of variances are

    def level(above: _Above) -> float:
        return float(np.exp2((above.logarithms - total) / above.count))

    # a convex function of the level's logarithm in straight pieces, met from the left: Newton's method ends on the root
    return _settled(spectra, level).distortion


def least_bits(spectra: Sequence[Spectrum], loss: float) -> float:
    """How many bits a weight, on average, have the least loss ``loss``: the inverse of ``least_loss``.

    Args:
        spectra: As for ``least_loss``.
        loss: More than 0.

    Returns:
        0 where no bits at all leave no more loss than that; infinity for no loss.
    """
    if loss >= sum(spectrum.power for spectrum in spectra):
        return 0.0
    if loss <= 0:
        return float("inf")

    def level(above: _Above) -> float:
        return (loss - above.below) / above.count

    above = _settled(spectra, level)  # concave in the level, met from the left
    bits = (above.logarithms - above.count * float(np.log2(above.level))) / 2
    return max(0.0, bits) / sum(spectrum.size for spectrum in spectra)


def entropy(counts: Array) -> float:
    """Bits that a symbol takes at least in a code for each of them, of symbols that occur so often.

    Args:
        counts: [symbols], none negative; some symbol occurs.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares @ np.log2(shares)))


@dataclass(frozen=True)
class _Above:
    """The components above a water level: how many, the sum of their logarithms, and what all others sum to."""

    level: float
    count: int
    logarithms: float
    below: float

    @classmethod
    def of(cls, spectra: Sequence[Spectrum], level: float) -> _Above:
        count, logarithms, below = 0, 0.0, 0.0
        for one in spectra:
            outputs, inputs = one.outputs[one.outputs > 0], one.inputs[one.inputs > 0]
            sums = np.concatenate([[0.0], np.cumsum(np.log2(inputs))])
            rest = np.concatenate([np.cumsum(inputs[::-1])[::-1], [0.0]])
            here = len(inputs) - np.searchsorted(inputs[::-1], level / outputs, side="right")
            count += int(here.sum())
            logarithms += float(here @ np.log2(outputs) + sums[here].sum())
            below += float(outputs @ rest[here])
        return cls(level, count, logarithms, below)

    @property
    def distortion(self) -> float:
        return self.count * self.level + self.below


def _settled(spectra: Sequence[Spectrum], level: Callable[[_Above], float]) -> _Above:
    """Raise the water from nothing, each time to the ``level`` that would be right for what was above it, until no
    more goes under.
    """
    above = _Above.of(spectra, 0.0)
    while above.count:
        raised = _Above.of(spectra, level(above))
        if raised.count == above.count:
            return raised
        above = raised
    return above
