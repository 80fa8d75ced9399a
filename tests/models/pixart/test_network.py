"""PixArt's transformer against diffusers' PixArtTransformer2DModel, with text of several lengths."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import numpy as np
import pytest

from support.pixart_reference import LENGTHS, NETWORKS, SIDES, network_pair


@pytest.mark.diffusers
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_as_diffusers(tmp_path, name, sides, lengths):
    found, wanted = network_pair(tmp_path, name, sides, LENGTHS[lengths])["prediction"]
    assert found.shape[:3] == (2, *sides)
    assert 0.5 < np.abs(wanted).max() < 5
    np.testing.assert_allclose(found, wanted, atol=1e-5)
