"""Parts against transformers' and diffusers' on tiny random configurations, in float32."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import pytest

from support.parts_reference import CASES, LIMITS, differences

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
]


@pytest.mark.parametrize("case", CASES)
def test_equal(case, tmp_path):
    found = differences(tmp_path, case)
    assert max(found.values()) < LIMITS.get(case, 1e-5), found
