"""Low-rank branches: float16 factors beside the integer weight that take what few directions can from its error.

``W = L + R`` with L = up · down of small rank; R is quantized, L is not, and L reads the unquantized input. Both
members fit L to what the integers do not hold, quantize the rest, and go on by turns, best first; they differ in the
norm of the fit. The residual is always taken against the factors as stored, so that rounding them to float16 costs
nothing. Of weights that are too small for that they are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...errors import NumericsError
from ...numerics.arrays import Array
from ...numerics.low_rank import LowRank
from ...numerics.moments import Moments, calibrated_gram, energy
from ..registry import Citation, register

SVDQUANT = Citation(
    "svdquant",
    """@inproceedings{li2025svdquant,
  title = {{SVDQuant}: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models},
  author = {Li, Muyang and Lin, Yujun and Zhang, Zhekai and Cai, Tianle and Li, Xiuyu and Guo, Junxian
            and Xie, Enze and Meng, Chenlin and Zhu, Jun-Yan and Han, Song},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2411.05007}
}""",
)

RoundResidual = Callable[
    [Array, "Moments | None"], Array
]  # a residual [out,in] to its dequantized codes [out,in], by these moments
TURNS, TRIAL_TURNS = 6, 2
DAMPINGS = (1.0, 10.0, 100.0)
LAST_DAMPING = 0.1
SPARE, DEPTH = 8, 6  # of the Krylov space: more directions than asked for, and how often they are multiplied


@dataclass(frozen=True)
class Norm:
    """The squared norm ``tr(E M Eᵀ)`` of errors E [out,in], M = ``gram`` [in,in] + ``ridge`` I; without a gram matrix
    that of E itself.
    """

    gram: Array | None = None
    ridge: float = 1.0

    def __call__(self, columns: Array) -> Array:
        """M times columns [in,n]."""
        own = columns * columns.dtype.type(self.ridge)
        return own if self.gram is None else own + self.gram @ columns


def leading_directions(weight: Array, norm: Norm, rank: int) -> Array:
    """U [out,rank] orthonormal, the leading eigenvectors of W M Wᵀ for W = ``weight`` [out,in], in its precision.

    By block Krylov iteration (arXiv 1504.05477, algorithm 2) from a fixed random start, because only few of them are
    wanted: for 32 of 1536 a fiftieth of the time of an eigendecomposition, and no matrix but W and M. ``rank`` is at
    most out.
    """
    block = min(len(weight), rank + SPARE)
    pieces = [np.random.default_rng(0).standard_normal((len(weight), block)).astype(weight.dtype)]
    for _ in range(DEPTH):
        pieces.append(np.linalg.qr(weight @ norm(weight.T @ pieces[-1]))[0])
    space = np.linalg.qr(np.concatenate(pieces[1:], axis=1))[0]
    seen = weight.T @ space
    vectors = np.linalg.eigh(seen.T @ norm(seen))[1]
    directions: Array = space @ vectors[:, : -rank - 1 : -1]
    return directions


def fitted(weight: Array, norm: Norm, rank: int) -> LowRank:
    """The branch of at most ``rank`` that is closest to ``weight`` [out,in] by ``norm``, as it is stored.

    With M = C Cᵀ the best L is (W C)_r C⁻¹ = U Uᵀ W, U the leading left singular vectors of W C: no factor of M is
    needed. The factors share the scale of each direction evenly, which keeps both inside float16, unless weights are
    very small.
    """
    directions = leading_directions(weight, norm, min(rank, *weight.shape))
    down = directions.T @ weight
    size = np.sqrt(np.linalg.norm(down, axis=1))
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    return LowRank.rounded(directions * size, down * inverse[:, None])


def by_turns(
    weight: Array, gram: Array, rank: int, quantize: Callable[[Array], Array], norm: Norm, turns: int = TURNS
) -> tuple[LowRank, float]:
    """Fit a branch to ``weight`` [out,in], quantize the residual, fit again to what that left, and so on while it
    helps.

    Returns the branch whose quantized residual left the least squared output error, and that error; ``gram`` [in,in]
    judges.
    """
    if not np.isfinite(weight).all():
        raise NumericsError(
            f"weight of shape {weight.shape} holds NaN or infinite values; repair or re-download the checkpoint"
        )
    weight = weight.astype(gram.dtype, copy=False)
    branch = best = fitted(weight, norm, rank)
    least = np.inf
    for _ in range(turns):
        residual = weight - branch.weight
        rounded = quantize(residual)
        error = float(energy(residual - rounded, gram).sum())
        if error >= least:
            break
        best, least = branch, error
        branch = fitted(weight - rounded, norm, rank)
    return best, least


@register("branch", "svd", citation=SVDQUANT, summary="what the weight's largest singular directions hold")
def svd(weight: Array, moments: Moments | None, rank: int, quantize: RoundResidual) -> LowRank:
    """L = SVD_r(W), then of what its quantized residual left (SVDQuant, arXiv 2411.05007, section 4.2); the best by
    output error stays.
    """
    return by_turns(
        weight, calibrated_gram(moments, weight.shape[1]), rank, lambda rows: quantize(rows, moments), Norm()
    )[0]


QERA = Citation(
    "qera",
    """@inproceedings{zhang2025qera,
  title = {{QERA}: an Analytical Framework for Quantization Error Reconstruction},
  author = {Zhang, Cheng and Wong, Jeffrey T. H. and Xiao, Can and Constantinides, George A. and Zhao, Yiren},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2410.06040}
}""",
)


@register(
    "branch", "whitened", citation=QERA, summary="what the output hangs on the most: low rank in the norm of the inputs"
)
def whitened(weight: Array, moments: Moments | None, rank: int, quantize: RoundResidual) -> LowRank:
    """L closest to W, then to what its quantized residual left, by the error of the output: ‖X (W − L)ᵀ‖ with damping.

    In that norm the fit has a closed form (QERA, arXiv 2410.06040, theorem 1, there for the error of one quantization).
    The damping is relative to mean(diag H), and large: a branch that only follows the inputs leaves wide steps to the
    residual; with all the damping there is it is ``svd``. It is the one of ``DAMPINGS`` whose rounded layer does best
    after ``TRIAL_TURNS``, on the calibration tokens or, where some are held out, on these, and without having seen
    them.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    assert moments is not None
    damping = _best_damping(weight, moments, rank, quantize)
    return replace(
        by_turns(weight, gram, rank, lambda rows: quantize(rows, moments), damped_norm(gram, damping))[0],
        damping=damping,
    )


def damped_norm(gram: Array, damping: float) -> Norm:
    """The norm of the output's error for inputs with this gram matrix [in,in] and, in all directions, ``damping``
    mean(diag) more.
    """
    return Norm(gram, damping * float(np.diagonal(gram).mean()))


def _best_damping(weight: Array, moments: Moments, rank: int, quantize: RoundResidual) -> float:
    """The one of ``DAMPINGS`` that does best; the branch is fitted, and its residual rounded, by the tokens that are
    not held out.
    """
    training, judge = moments.training, moments if moments.held_out is None else moments.held_out
    errors = [
        by_turns(
            weight,
            judge.gram,
            rank,
            lambda rows: quantize(rows, training),
            damped_norm(training.gram, damping),
            TRIAL_TURNS,
        )[1]
        for damping in DAMPINGS
    ]
    return DAMPINGS[int(np.argmin(errors))]


def refitted(
    branch: LowRank, weight: Array, rounded: Array, moments: Moments, damping: float = LAST_DAMPING
) -> LowRank:
    """The branch of the same rank fitted once more, to what a weight [out,in] keeps beside its ``rounded`` residual
    [out,in].

    Now that nothing will be rounded any more, only the output counts. The one given stays where it leaves less error of
    it.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    left = (weight - rounded).astype(gram.dtype, copy=False)
    other = fitted(left, damped_norm(gram, damping), branch.rank)
    errors = [energy(left - candidate.weight, gram).sum() for candidate in (branch, other)]
    return replace(other, damping=branch.damping) if errors[1] < errors[0] else branch
