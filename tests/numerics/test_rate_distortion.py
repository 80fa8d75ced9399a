"""The rate-distortion limit, against float64 references that write all components down and against what textbooks have
of Gaussian weights.
"""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.numerics.rate_distortion import Spectrum, entropy, least_bits, least_loss, loss, spectrum


def random_factor(rng, width, rank=None):
    """A positive matrix whose eigenvalues span six orders of magnitude."""
    vectors, _ = np.linalg.qr(rng.standard_normal((width, width)))
    values = np.logspace(0, -6, width) * rng.uniform(0.5, 2, width)
    if rank is not None:
        values[rank:] = 0
    return (vectors * values) @ vectors.T


def by_bisection(variances, bits):
    """Distortion and rate a component of reverse water-filling over components that are all written down."""
    low, high = 1e-30, variances.max()
    for _ in range(400):
        level = np.sqrt(low * high)
        rate = 0.5 * np.log2(np.maximum(variances / level, 1)).mean()
        low, high = (level, high) if rate > bits else (low, level)
    return np.minimum(variances, level).sum()


@pytest.mark.parametrize("bits", [0.1, 0.5, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("two_sided", [False, True])
def test_limit_is_water_filling_over_the_kronecker_products_eigenvalues(bits, two_sided):
    rng = np.random.default_rng(int(10 * bits))
    weight = rng.standard_normal((7, 12)) * rng.uniform(0.1, 2, (7, 1))
    inputs, outputs = random_factor(rng, 12), random_factor(rng, 7) if two_sided else None
    root = np.diag(np.sqrt((weight**2).mean(1)))
    whole = np.kron(root @ (np.eye(7) if outputs is None else outputs) @ root, inputs)
    expected = by_bisection(np.maximum(np.linalg.eigvalsh(whole), 1e-25), bits)
    found = least_loss([spectrum(weight, inputs, outputs)], bits)
    assert found == pytest.approx(expected, rel=1e-6)
    assert least_bits([spectrum(weight, inputs, outputs)], found) == pytest.approx(bits, rel=1e-9)


def test_bits_go_where_they_buy_most_among_several_weights():
    rng = np.random.default_rng(3)
    spectra = [
        Spectrum(np.sort(rng.exponential(size=m))[::-1], scale * np.sort(rng.exponential(size=n))[::-1])
        for m, n, scale in ((3, 5, 1.0), (4, 2, 100.0), (2, 9, 1e-4))
    ]
    everything = np.concatenate([np.outer(one.outputs, one.inputs).ravel() for one in spectra])
    for bits in (0.3, 2, 5):
        together = least_loss(spectra, bits)
        assert together == pytest.approx(by_bisection(everything, bits), rel=1e-9)
        assert together < sum(least_loss([one], bits) for one in spectra)
        assert least_bits(spectra, together) == pytest.approx(bits)


def test_without_bits_everything_is_lost_and_no_bits_are_needed_for_that():
    one = Spectrum(np.array([2.0, 1.0]), np.array([3.0, 0.5, 0.0]))
    assert least_loss([one], 0) == pytest.approx(one.power) == 3 * 3.5
    assert least_bits([one], one.power) == 0
    assert least_bits([one], 0.0) == np.inf


def test_inputs_that_never_vary_cost_no_bits():
    """Half of the directions have no weight in the loss: the bits are for the other half."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((6, 8)), random_factor(rng, 8, rank=4)
    found = spectrum(weight, inputs)
    assert (found.inputs > 0).sum() == 4
    assert least_loss([found], 2) == pytest.approx(
        least_loss([Spectrum(found.outputs, found.inputs[:4])], 4), rel=1e-12
    )


def test_a_dead_row_costs_no_bits_but_its_share_of_the_budget_helps_the_others():
    rng = np.random.default_rng(1)
    weight, inputs = rng.standard_normal((4, 8)), random_factor(rng, 8)
    weight[2:] = 0
    assert least_loss([spectrum(weight, inputs)], 2) == pytest.approx(least_loss([spectrum(weight[:2], inputs)], 4))


def test_nothing_to_lose_is_no_loss():
    assert least_loss([spectrum(np.zeros((2, 3)), np.eye(3))], 2) == 0
    assert least_loss([spectrum(np.ones((2, 3)), np.zeros((3, 3)))], 2) == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_rounding_gets_below_the_limit(seed):
    """Gaussian weights on a searched 3-bit grid, the codes corrected from column to column: still above it."""
    rng = np.random.default_rng(seed)
    weight, inputs = rng.standard_normal((64, 32)), random_factor(rng, 32)
    best = np.inf
    for step in np.linspace(0.3, 1, 30):
        grid = Grid.symmetric(WeightFormat(3), np.full((64, 1), step))
        best = min(best, loss(weight - grid.dequantize(grid.quantize(weight)), inputs))
    assert best > least_loss([spectrum(weight, inputs)], 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_is_the_quadratic_form(dtype):
    rng = np.random.default_rng(2)
    change, inputs, outputs = rng.standard_normal((5, 300)), random_factor(rng, 300), random_factor(rng, 5)
    for factor in (None, outputs):
        whole = np.kron(np.eye(5) if factor is None else factor, inputs)
        expected = change.ravel() @ whole @ change.ravel()
        found = loss(change, inputs.astype(dtype), None if factor is None else factor.astype(dtype))
        assert found == pytest.approx(expected, rel=1e-4 if dtype == np.float32 else 1e-12)


def test_factors_that_are_none_are_refused():
    with pytest.raises(NumericsError, match=r"a factor of shape \(3, 3\), expected finite numbers of shape \(4, 4\)"):
        spectrum(np.ones((2, 4)), np.eye(3))
    with pytest.raises(NumericsError, match="expected finite numbers"):
        spectrum(np.ones((2, 4)), np.full((4, 4), np.nan))


def test_entropy_of_codes():
    assert entropy(np.array([5, 5, 5, 5])) == 2
    assert entropy(np.array([0, 7, 0])) == 0
    assert entropy(np.array([1, 2, 1])) == 1.5


# Gaussian weights under a white loss, where all is known. A source of unit variance, by its density on a fine lattice.
LATTICE = np.linspace(-9, 9, 36001)
DENSITY = np.exp(-(LATTICE**2) / 2) / np.exp(-(LATTICE**2) / 2).sum()


def decibels(distortion):
    return -10 * np.log10(distortion)


def uniform(bits, half_offset):
    """dB and entropy of the best step of our grid, with zero on a code or half a step away from it."""
    found = []
    for step in np.geomspace(0.2, 1.5, 400):
        scales = np.full((1, 1), step, np.float32)
        grid = Grid.symmetric(WeightFormat(bits), scales)
        if half_offset:
            grid = Grid(WeightFormat(bits, symmetric=False), grid.scales, grid.biases + grid.scales / 2)
        codes = grid.quantize(LATTICE[None])
        distortion = float(np.square(LATTICE - grid.dequantize(codes)[0]) @ DENSITY)
        found.append((distortion, entropy(np.bincount(codes[0], DENSITY))))
    least, bits_of_codes = min(found)
    return decibels(least), bits_of_codes


def scalar_at_entropy(bits):
    """dB of an endless uniform quantizer whose cells are told by their means, with codes of this entropy."""
    low, high = 1e-2, 6.0
    for _ in range(60):
        step = np.sqrt(low * high)
        cells = np.rint(LATTICE / step).astype(int)
        cells -= cells.min()
        mass = np.bincount(cells, DENSITY)
        low, high = (step, high) if entropy(mass) > bits else (low, step)
    means = np.bincount(cells, DENSITY * LATTICE) / np.maximum(mass, 1e-300)
    return decibels(np.square(LATTICE - means[cells]) @ DENSITY)


def lloyd_max(levels):
    values = np.linspace(-2.5, 2.5, levels)
    for _ in range(2000):
        cells = np.searchsorted((values[1:] + values[:-1]) / 2, LATTICE)
        values = np.bincount(cells, DENSITY * LATTICE) / np.bincount(cells, DENSITY)
    return decibels(np.square(LATTICE - values[cells]) @ DENSITY)


@pytest.mark.parametrize(
    ("bits", "limit", "coded", "lloyd", "on_a_code", "half_way", "entropy_of_codes"),
    [
        (2, 12.04, 10.51, 9.30, 8.25, 9.25, 1.78),
        (3, 18.06, 16.53, 14.62, 13.91, 14.26, 2.72),
        (4, 24.08, 22.55, 20.22, 19.26, 19.37, 3.59),
    ],
)
def test_gaussian_weights_are_as_textbooks_have_them(bits, limit, coded, lloyd, on_a_code, half_way, entropy_of_codes):
    """Rate-distortion, entropy-coded scalar (Gish and Pierce 1968: 1.53 dB below it at high rates), Lloyd-Max (Max
    1960) and our own uniform grid.
    """
    white = Spectrum(np.ones(3), np.ones(5))
    assert decibels(least_loss([white], bits) / white.power) == pytest.approx(limit, abs=0.005)
    assert scalar_at_entropy(bits) == pytest.approx(coded, abs=0.03)
    assert lloyd_max(2**bits) == pytest.approx(lloyd, abs=0.01)
    found, bits_of_codes = uniform(bits, half_offset=False)
    assert found == pytest.approx(on_a_code, abs=0.01)
    assert bits_of_codes == pytest.approx(entropy_of_codes, abs=0.005)
    assert uniform(bits, half_offset=True)[0] == pytest.approx(half_way, abs=0.01)
    assert least_bits([white], 10 ** (-found / 10) * white.power) == pytest.approx(found / (20 * np.log10(2)))
