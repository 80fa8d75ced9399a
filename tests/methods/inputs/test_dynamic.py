"""TCAQ-DM's choice between uniform and logarithmic levels."""

import numpy as np
import pytest

from mlxquant.methods.inputs.clipping import error, extremes
from mlxquant.methods.inputs.dynamic import dynamic, power_law_ratio
from mlxquant.methods.inputs.tiers import OutputErrors
from mlxquant.numerics.input_ranges import InputRanges

rng = np.random.default_rng(0)
SIZE = (64, 64)
POWER_LAWS = {
    "pareto": rng.pareto(2.0, SIZE),
    "steep pareto": rng.pareto(4.0, SIZE),
    "softmax": rng.dirichlet(np.full(64, 0.05), 64),
}
OTHERS = {
    "normal": rng.normal(0, 1, SIZE),
    "far from 0": rng.normal(90, 1, SIZE),
    "uniform": rng.uniform(0, 3, SIZE),
    "exponential": rng.exponential(2.0, SIZE),
    "half normal": np.abs(rng.normal(0, 1, SIZE)),
    "student": rng.standard_t(4, SIZE),
    "flat softmax": rng.dirichlet(np.full(64, 50.0), 64),
}
WEIGHT = rng.normal(size=(8, 64))


def ranges(*levels):
    """Ranges whose rows are all there is."""
    rows = np.stack(levels).astype(np.float32)
    low, high = rows.min(1), rows.max(1)
    return InputRanges(np.linspace(0.1, 1, len(rows)).astype(np.float32), low, high, low, high, rows)


@pytest.mark.parametrize("name", POWER_LAWS)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_power_laws_are_recognised_at_any_scale(name, scale):
    x = POWER_LAWS[name]
    assert power_law_ratio(scale * (x - x.min())) > 0.01
    assert power_law_ratio(scale * (x - x.min())) == pytest.approx(power_law_ratio(x - x.min()), rel=1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_power_laws(name):
    assert power_law_ratio(OTHERS[name] - OTHERS[name].min()) < 0


def test_a_power_law_ratio_is_the_difference_of_log_likelihoods():
    """Against scipy-free integrals: Pareto's likelihood at the truth is met, and the rivals' are those of the
    textbook.
    """
    x = np.random.default_rng(3).pareto(2.0, 100_000)  # Lomax with a = 2, l = 1
    truth = np.mean(np.log(2.0) - 3 * np.log1p(x))
    exponential = np.mean(-np.log(x.mean()) - x / x.mean())
    penalty = np.log(len(x)) / (2 * len(x))
    assert power_law_ratio(x) == pytest.approx(truth - exponential - penalty, abs=1e-3)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_log2_on_pareto_data_and_uniform_on_normal_data_each_noise_level_by_itself(bits):
    found = dynamic(ranges(OTHERS["normal"], POWER_LAWS["pareto"], OTHERS["uniform"]), WEIGHT, bits)
    assert found.log.tolist() == [False, True, False]
    uniform = error(ranges(OTHERS["normal"], POWER_LAWS["pareto"], OTHERS["uniform"]), WEIGHT, bits)
    np.testing.assert_array_equal(found.step[[0, 2]], uniform.step[[0, 2]])
    np.testing.assert_array_equal(found.shift[[0, 2]], uniform.shift[[0, 2]])
    low, high = (np.float32(end(POWER_LAWS["pareto"])) for end in (np.min, np.max))
    np.testing.assert_allclose([found.shift[1, 0], found.shift[1, 0] + found.step[1]], [low, high], rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_power_law_is_better_off_with_it_at_every_width(bits):
    """Powers of two alone would be so at 4 bits only: more bits do not make them finer."""
    seen = ranges(POWER_LAWS["pareto"])
    errors = OutputErrors(seen, WEIGHT)
    assert errors(dynamic(seen, WEIGHT, bits))[0] < 0.5 * errors(extremes(seen, WEIGHT, bits))[0]


def test_equal_values_are_uniform():
    assert power_law_ratio(np.zeros(9)) == power_law_ratio(np.full(9, 3.0)) == 0
    assert not dynamic(ranges(np.full(SIZE, 3.0)), WEIGHT, 8).log.any()


@pytest.mark.parametrize(
    ("name", "rivals"), [("pareto", 1), ("exponential", 1), ("uniform", 1), ("far from 0", 2), ("normal", 2)]
)
def test_a_parameter_costs_half_the_logarithm_of_the_number_of_values(name, rivals):
    """The same values five times have the same likelihoods, and every parameter costs less a value. The power law has
    two parameters, its best rival one or two.
    """
    x = (POWER_LAWS | OTHERS)[name].reshape(-1)[:200]
    x = x - x.min()
    price = [np.log(n) / (2 * n) for n in (200, 1000)]
    cheaper = power_law_ratio(np.tile(x, 5)) - power_law_ratio(x)
    assert cheaper == pytest.approx((2 - rivals) * (price[0] - price[1]), abs=1e-12)
