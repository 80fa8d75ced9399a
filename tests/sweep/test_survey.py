"""What bits buy in a layer, against the tokens themselves."""

import numpy as np
import pytest

from mlxquant.curvature import sensitivity
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods import registry
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.part_moments import PartMoments
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.survey import weight_errors


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_a_weights_error_counts_each_output_at_its_own_cost_averaged_over_levels(rounding):
    """Against the tokens themselves, with costs that differ so much between outputs that their mean gives another
    number.
    """
    random = np.random.default_rng(0)
    weight, inputs = random.normal(size=(6, 32)).astype(np.float32), random.normal(size=(200, 32)).astype(np.float32)
    costs = 10.0 ** np.arange(-2, 4) * np.array([[1.0], [5.0]])
    spec = parse_recipe(f"{rounding}-w4a16").rules[-1][1]
    formats = [WeightFormat(2), WeightFormat(3), WeightFormat(6), WeightFormat(7), WeightFormat(8), None]
    moments = Moments.of(inputs)
    table = sensitivity.Sensitivity(np.float32([0.2, 0.8]), {}, {"layer": costs})
    found = weight_errors("layer", spec, formats, PartMoments.one(moments), weight, table)
    both = Moments(moments.gram, moments.count, moments.gram)
    np.testing.assert_allclose(found[3:], [found[2] / 4, found[2] / 4**2, 0])  # without a look at them
    for form, error in zip(formats[:3], found, strict=False):
        grid = registry.get("steps", spec.steps).function(weight, form, both)
        codes = registry.get("round", rounding).function(weight, grid, both)
        wrong = inputs @ (weight - grid.dequantize(codes)).T
        assert error == pytest.approx((np.square(wrong).mean(0) * costs.mean(0)).sum(), rel=1e-4)
