"""KID and CMMD against their definitions, pair by pair."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics import discrepancy
from mlxquant.metrics.discrepancy import cmmd, kid

RNG = np.random.default_rng(0)


def kid_by_definition(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    own = sum(k(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return own - 2 * sum(k(a, b) for a in x for b in y) / n**2


def cmmd_by_definition(x, y):
    def mean(a, b):
        return np.mean([[np.exp(-((u - v) @ (u - v)) / 200) for v in b] for u in a])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def unit(n, width=7):
    x = RNG.standard_normal((n, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_kid_of_all_pictures():
    x, y = RNG.standard_normal((11, 5)), RNG.standard_normal((11, 5)) + 0.3
    assert kid(x, y) == pytest.approx(kid_by_definition(x, y), rel=1e-10)
    assert kid(x, y, subsets=3, seed=9) == kid(x, y)


def test_kid_of_subsets_is_near_that_of_all_and_seeded():
    x, y = RNG.standard_normal((400, 5)), 1.5 * RNG.standard_normal((400, 5))
    assert kid(x, y, size=100, subsets=200) == pytest.approx(kid(x, y), rel=0.1)
    assert kid(x, y, size=100, seed=1) == kid(x, y, size=100, seed=1) != kid(x, y, size=100, seed=2)
    assert kid(x[:30], y) == pytest.approx(kid(x, y), rel=0.5)


def test_kid_is_unbiased():
    """Around zero for two sets of one kind, however small."""
    values = [kid(RNG.standard_normal((6, 4)), RNG.standard_normal((6, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


@pytest.mark.parametrize("strip", [3, 1024])
def test_cmmd(monkeypatch, strip):
    monkeypatch.setattr(discrepancy, "STRIP", strip)
    x, y = unit(8), unit(5)
    assert cmmd(x, y) == pytest.approx(cmmd_by_definition(x, y), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_of_one_picture_a_set():
    x, y = unit(1), unit(1)
    assert cmmd(x, y) == pytest.approx(cmmd_by_definition(x, y), rel=1e-9)


def test_what_has_no_distance_is_refused():
    with pytest.raises(NumericsError, match="at least two pictures a set, found one"):
        kid(unit(1), unit(5))
    for distance in (kid, cmmd):
        with pytest.raises(NumericsError, match="equal width"):
            distance(unit(3), unit(3, 8))
        with pytest.raises(NumericsError, match="equal width"):
            distance(unit(3)[:0], unit(3))
        with pytest.raises(NumericsError, match="NaN"):
            distance(unit(3) * np.nan, unit(3))
