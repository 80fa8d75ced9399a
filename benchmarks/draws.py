"""How far a mean over prompts *and* calibration draws may be off.

A figure of a quantized model depends on the prompts that it was measured on and on the data that it was calibrated on.
Both are samples, so both belong into the interval; an interval over prompts alone says how well one particular
calibration was measured, not how well a method does. Values are a table of draws by prompts, every draw on the same
prompts: two crossed random effects and what is left,

    value_dp = mean + draw_d + prompt_p + rest_dp

The standard error of each effect has its own degrees of freedom, and the two half-widths of Student's t are added in
quadrature (Howe 1974, JASA 69, for the mean of a sum of two independent variables). Three draws are few, and t says so:
where draws differ more than prompts, the interval is 4.3 standard errors wide each way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from mlxquant.metrics.bootstrap import interval as over_prompts


def interval(values: npt.ArrayLike, level: float = 0.95) -> list[float]:
    """The interval of the mean of values [D,P] over D draws and P prompts.

    With one draw it is the bootstrap over its prompts, and nothing is known of other draws.

    Args:
        values: Finite, at least one draw and two prompts.
        level: The share of repetitions, with other draws and other prompts, that hold the true mean.

    Returns:
        [low, high].
    """
    table: npt.NDArray[np.float64] = np.asarray(values, np.float64)
    if len(table) == 1:
        found = over_prompts(table[0])
        assert found is not None, "one prompt has no interval"
        return found
    effects = [table.mean(1), table.mean(0)]  # of each draw, of each prompt; what is left is in both
    errors = np.array([means.std(ddof=1) / means.size**0.5 for means in effects])
    tails = student.ppf((1 + level) / 2, [means.size - 1 for means in effects])
    half = float(np.hypot(*(errors * tails)))
    return [float(table.mean() - half), float(table.mean() + half)]


def tied(found: list[float]) -> bool:
    """Whether an interval of a difference holds zero: then the two cannot be told apart."""
    return found[0] <= 0 <= found[1]


def table(rows: list[dict[str, Any]], key: str) -> npt.NDArray[np.float64]:
    """``key`` of one row a draw, lists of the same prompts, as [D,P]."""
    return np.array([row[key] for row in rows], np.float64)
