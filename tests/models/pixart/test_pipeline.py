"""PixArt from a folder of the hub's layout, against diffusers' pipelines on the same folder: the same latents in, the
same sequence of latents out, and the same pictures.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import numpy as np
import pytest

from support.pixart_reference import HOSTS, STEPS, pipeline_pair

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
]


@pytest.mark.parametrize("negative", ["", "green hills"])
@pytest.mark.parametrize("name", HOSTS)
def test_the_same_latents_and_pictures(tmp_path, name, negative):
    pairs = pipeline_pair(tmp_path, name, negative)
    found, wanted = pairs["latents"]
    assert len(found) == len(wanted) == STEPS + 1
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=f"before step {step}")
    assert np.abs(wanted[-1] - wanted[0]).max() > 0.3
    np.testing.assert_allclose(*pairs["pictures"], atol=1e-4)
