"""Second moments of a layer's inputs: all that a rounding method needs to know of the calibration data, in bounded
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import CalibrationError, NumericsError
from .arrays import Array

KEPT_MEAN = 1e-3  # of the second moments of a mean, in centred ones
PANEL = 256  # columns of a gram matrix in a product; what is symmetric is computed once outside of them


class Moments:
    """``gram`` [in,in]: the sum of x~ x~ᵀ over ``count`` tokens x~ [in], the inputs of the partly quantized model.

    ``cross`` [in,in] is the sum of x~ xᵀ with x the same token's input in the full-precision model, for methods that
    correct the error of the layers before (Qronos, arXiv 2505.11695); None where only one stream was seen.

    ``held_out`` are the moments of those tokens among them that were added with ``held_out=True``: a method may be
    tried on ``training``, the rest, and judged on them (``damping``). None where no token was.

    ``outputs`` [out,out] says how errors of the layer's outputs add up in what the model predicts; None where each
    counts for itself, and alike.

    ``total`` [in] is the sum of x~, and ``exact_total`` that of x; they count as tokens count, ``mass`` times in all.

    The precision of the gram matrix, float32 or float64, is that of what is computed from it: products with it are most
    of a rounding method's work. An entry H_ij is only known to a few float32 roundings of √(H_ii H_jj), which is far
    below what damping adds.
    """

    def __init__(self, gram: Array, count: int, cross: Array | None = None, held_out: Moments | None = None):
        self._gram, self.count, self.cross, self.held_out = gram, count, cross, held_out
        self.total, self.exact_total, self.mass = np.zeros(len(gram)), np.zeros(len(gram)), 0.0
        self.outputs: Array | None = None
        self._mirrored = True

    @classmethod
    def empty(cls, width: int, dtype: npt.DTypeLike = np.float32) -> Moments:
        return cls(np.zeros((width, width), dtype), 0)

    @classmethod
    def of(cls, inputs: Array) -> Moments:
        """The moments of inputs [...,in], in their precision, at least float32."""
        moments = cls.empty(inputs.shape[-1], np.result_type(inputs, np.float32))
        moments.add(inputs)
        return moments

    @classmethod
    def identity(cls, width: int) -> Moments:
        """As if every input channel had been seen once, alone: methods then minimise the error of the weight itself."""
        return cls(np.eye(width), width)

    @property
    def gram(self) -> Array:
        if not self._mirrored:
            for start in range(0, self.width, PANEL):
                here, after = slice(start, start + PANEL), slice(start + PANEL, None)
                self._gram[after, here] = self._gram[here, after].T
                self._gram[here, here] = np.triu(self._gram[here, here]) + np.triu(self._gram[here, here], 1).T
            self._mirrored = True
        return self._gram

    @property
    def width(self) -> int:
        return int(self._gram.shape[0])

    @property
    def training(self) -> Moments:
        """Those of the tokens that are not held out: all of them where none are."""
        if (held := self.held_out) is None:
            return self
        cross = None if self.cross is None or held.cross is None else self.cross - held.cross
        return Moments(self.gram - held.gram, self.count - held.count, cross)

    def add(self, inputs: Array, exact: Array | None = None, weight: float = 1.0, held_out: bool = False) -> None:
        """Add inputs [...,in], and the same tokens' ``exact`` inputs in the full-precision model where ``cross`` is
        wanted, in place.

        They count ``weight`` times, and among the ``held_out`` where it says so. Raises NumericsError when they are not
        finite, CalibrationError on another width.
        """
        if inputs.shape[-1] != self.width:
            raise CalibrationError(
                f"inputs of shape {inputs.shape} do not belong to a layer of input width {self.width}"
            )
        dtype = self._gram.dtype
        tokens = inputs.reshape(-1, self.width).astype(dtype, copy=False)
        power = np.einsum("ti,ti->i", tokens, tokens)
        if not np.isfinite(power).all():  # a NaN or infinity cannot hide from its square
            raise NumericsError(
                f"inputs of shape {inputs.shape} hold NaN or infinite values, first in channel"
                f" {int(np.argmin(np.isfinite(power)))}; calibrate on inputs that the full-precision model can process"
            )
        reference = None if exact is None else exact.reshape(-1, self.width).astype(dtype, copy=False)
        if reference is not None and self.cross is None:
            self.cross = np.zeros_like(self._gram)
        for start in range(0, self.width, PANEL):
            here = slice(start, start + PANEL)
            panel = (tokens[:, here] * dtype.type(weight)).T
            self._gram[here, start:] += panel @ tokens[:, start:]  # the other half follows when it is asked for
            if reference is not None and self.cross is not None:
                self.cross[here] += panel @ reference
        self._mirrored = False
        self.count += len(tokens)
        self.mass += weight * len(tokens)
        self.total += weight * tokens.sum(0, dtype=np.float64)
        if reference is not None:
            self.exact_total += weight * reference.sum(0, dtype=np.float64)
        if held_out:
            self.held_out = self.held_out or Moments.empty(self.width, dtype)
            self.held_out.add(inputs, exact, weight)

    @property
    def mean(self) -> Array:
        """Of the tokens, float64 [in]; zeros where none was added."""
        return self.total / self.mass if self.mass else self.total

    @property
    def centred(self) -> Moments:
        """Those of the tokens less their mean: what is left to minimise where a bias makes up for the mean of the
        error, see ``sweep.layer``. A thousandth of the mean's own stays, so that inputs that never change still say
        which channels there are.
        """
        if not self.mass:
            return self
        cross, share, dtype = None, (1 - KEPT_MEAN) / self.mass, self._gram.dtype
        if self.cross is not None:
            exact = self.total if self.cross is self._gram else self.exact_total
            cross = self.cross - np.outer(self.total, exact * share).astype(dtype)
        gram = self.gram - np.outer(self.total, self.total * share).astype(dtype)
        return Moments(gram, self.count, cross, None if self.held_out is None else self.held_out.centred)

    def see_one_stream(self) -> None:
        """From now on the full-precision model's inputs are taken to be these."""
        self.cross = self.gram
        if self.held_out is not None:
            self.held_out.see_one_stream()

    def divided(self, divisor: Array) -> Moments:
        """The moments of inputs whose channels are divided by ``divisor`` [in]."""
        inverse = 1 / divisor.astype(self._gram.dtype)
        cross = None if self.cross is None else self.cross * inverse * inverse[:, None]
        held_out = None if self.held_out is None else self.held_out.divided(divisor)
        return Moments(self.gram * inverse * inverse[:, None], self.count, cross, held_out)

    def mapped(self, map_rows: Callable[[Array], Array]) -> Moments:
        """The moments of inputs that go through a linear map, given by what it does to rows [n,in]: x M for
        each row x.
        """

        def both_sides(gram: Array) -> Array:
            """Mᵀ G M, in G's precision."""
            half = map_rows(map_rows(gram).T)
            return np.ascontiguousarray(half.T).astype(gram.dtype, copy=False)

        cross = None if self.cross is None else both_sides(self.cross)
        return Moments(
            both_sides(self.gram), self.count, cross, None if self.held_out is None else self.held_out.mapped(map_rows)
        )


def output_error(weight: Array, quantized: Array, moments: Moments) -> float:
    """Relative output error ‖X(W−Q)ᵀ‖ / ‖XWᵀ‖ of weights [out,in], from the gram matrix alone; 0 for equal weights."""
    noise = energy(weight - quantized, moments.gram).sum()
    signal = energy(weight, moments.gram).sum()
    if noise == 0:
        return 0.0
    return float(np.sqrt(noise / signal)) if signal > 0 else float("inf")


def energy(rows: Array, gram: Array) -> Array:
    """d H dᵀ of each row d of ``rows`` [out,in], H = ``gram`` symmetric: float64 [out], never negative.

    Computed in H's precision. What is left of H's diagonal and on it is enough, which saves half of the work.
    """
    rows = rows.astype(gram.dtype, copy=False)
    energies = np.zeros(len(rows))
    for start in range(0, len(gram), PANEL):
        here = slice(start, start + PANEL)
        product = rows[:, :start] @ gram[:start, here]
        product *= 2
        product += rows[:, here] @ gram[here, here]
        energies += np.einsum("oi,oi->o", product, rows[:, here])
    return np.maximum(energies, 0)


def excess(change: Array, gram: Array, missing: Array | None = None) -> Array:
    """By how much each row's squared output error grows when its weight w is replaced by q = w − d, d in ``change``
    [out,in]: float64 [out].

    Without ``missing`` that is ``energy``. With it, the ``shortfall`` of w, it is ‖Xw−X~q‖² − ‖Xw−X~w‖² = d H dᵀ + 2
    d·(G−H)w, which no longer cancels large numbers and is negative where q makes up for some of the error of the layers
    before.
    """
    grown = energy(change, gram)
    return grown if missing is None else grown + 2 * np.einsum("oi,oi->o", change, missing, dtype=np.float64)


def shortfall(weight: Array, moments: Moments) -> Array:
    """(G − H) w of each row w of ``weight`` [out,in]: what of its full-precision output the inputs X~ miss. [out,in],
    gram's precision.

    H = X~ᵀX~ is the gram matrix and G = X~ᵀX the cross term; zero where both models see the same. Raises
    CalibrationError without a cross term, NumericsError when it is not finite.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    if moments.cross is None:
        raise CalibrationError(
            "this needs the inputs of both the quantized and the full-precision model; collect the cross moments"
        )
    weight = weight.astype(gram.dtype, copy=False)
    missing = np.empty_like(weight)
    for start in range(0, moments.width, PANEL):
        here = slice(start, start + PANEL)
        change = moments.cross[here] - gram[here]
        if not np.isfinite(change).all():
            raise NumericsError(
                f"the cross moments of {moments.width} inputs hold NaN or infinite values; calibrate again"
            )
        missing[:, here] = weight @ change.T
    return missing


def calibrated_gram(moments: Moments | None, width: int) -> Array:
    """The gram matrix [in,in], for methods that cannot do without; CalibrationError when there is none or it does not
    fit.
    """
    if moments is None or moments.count == 0:
        raise CalibrationError("this method needs the moments of the layer's inputs; calibrate first, or use 'rtn'")
    if moments.width != width:
        raise CalibrationError(f"moments of {moments.width} inputs do not belong to a weight with {width} inputs")
    if not np.isfinite(moments.gram).all():
        raise NumericsError(f"the gram matrix of {width} inputs holds NaN or infinite values; calibrate again")
    return moments.gram


def calibrated_outputs(moments: Moments | None, height: int) -> Array | None:
    """How errors of a layer's outputs add up [out,out], None where nobody has said; CalibrationError when it does not
    fit, NumericsError when it is not finite.
    """
    outputs = None if moments is None else moments.outputs
    if outputs is None:
        return None
    if outputs.shape != (height, height):
        found = ",".join(map(str, outputs.shape))
        raise CalibrationError(
            f"a weight of {height} outputs needs a Hessian [{height},{height}] of them, found [{found}]; measure it on"
            " this layer"
        )
    if not np.isfinite(outputs).all():
        raise NumericsError(f"the Hessian of {height} outputs holds NaN or infinite values; calibrate again")
    return outputs
