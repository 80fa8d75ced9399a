"""The picture of tiers: each cell has its tier's colour, at its own timestep."""

import numpy as np
import pytest

from mlxquant.report.tiers import COLOURS, draw_tiers


@pytest.mark.parametrize("steps", [1, 4])
def test_columns_run_from_noise_to_picture(steps):
    bits = np.array([4, 6, 8, 8][:steps])  # by ascending sigma
    page = np.asarray(draw_tiers(np.linspace(0.1, 1, steps), {"a.layer": bits}, {"a.layer": np.ones(steps)}, "title"))
    places = {tier: np.argwhere((page[60:] == COLOURS[tier]).all(-1)) for tier in COLOURS}
    assert {tier for tier, found in places.items() if len(found) > 100} == set(bits.tolist())
    if steps == 4:
        columns = {tier: found[:, 1].mean() for tier, found in places.items()}
        assert columns[8] < columns[6] < columns[4]
        assert len(places[8]) == pytest.approx(2 * len(places[4]), rel=0.1)
