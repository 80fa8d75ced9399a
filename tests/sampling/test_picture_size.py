"""Sizes of pictures: what people write, what is kept, what is refused."""

import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sampling.picture_size import picture_size, plain, told


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (64, (64, 64)),
        ("64", (64, 64)),
        ((768, 512), (768, 512)),
        ([768, 512], (768, 512)),
        ("768x512", (768, 512)),
        (" 768X512 ", (768, 512)),
        ("768×512", (768, 512)),
        (np.int64(32), (32, 32)),
    ],
)
def test_width_comes_first_and_one_number_is_a_square(written, size):
    assert picture_size(written) == size


@pytest.mark.parametrize("size", [(64, 64), (768, 512), (1, 16384)])
def test_what_is_told_and_kept_is_read_again(size):
    assert picture_size(told(size)) == picture_size(plain(size)) == size


def test_squares_are_kept_as_in_earlier_releases():
    assert (plain((64, 64)), told((64, 64))) == (64, "64")
    assert (plain((96, 64)), told([96, 64])) == ([96, 64], "96x64")


BAD = [0, -1, 16385, True, 1.5, None, (), (1, 2, 3), (1, 0), ("1", 2)]
BAD_TEXTS = ["", "x", "768x", "x512", "1x2x3", "big", "1.5", "-5", "\u0669x9"]


@pytest.mark.parametrize("written", BAD + BAD_TEXTS)
def test_what_is_no_size_is_one_clear_error(written):
    with pytest.raises(AdapterError, match="is no size of a picture; expected WIDTHxHEIGHT such as 768x512"):
        picture_size(written)
