"""Named rows: whatever a model reads, taken and joined without knowing what it is."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sampling.conditioning import Conditioning


def some(rows=3, first=0):
    numbers = mx.arange(first, first + rows)
    return Conditioning(
        tokens=mx.broadcast_to(numbers[:, None, None].astype(mx.float32), (rows, 4, 5)),
        mask=mx.broadcast_to((numbers % 2 == 0)[:, None], (rows, 4)),
        size=numbers,
    )


def sizes(conditioning):
    return conditioning["size"].tolist()


def test_every_array_is_taken_along_its_rows():
    text = some()
    assert len(text) == 3
    assert set(text.keys()) == {"tokens", "mask", "size"}
    for rows, left in ((slice(1, 3), [1, 2]), (mx.array([2, 0, 0]), [2, 0, 0])):
        taken = text.take(rows)
        assert len(taken) == len(left)
        assert sizes(taken) == left
        assert taken["tokens"][:, 0, 0].tolist() == left
        assert taken["mask"][:, 0].tolist() == [row % 2 == 0 for row in left]
        assert taken["mask"].dtype == mx.bool_
        assert taken["size"].dtype == mx.int32


def test_joined_rows_follow_each_other():
    both = some(2).joined(some(1, first=7))
    assert len(both) == 3
    assert sizes(both) == [0, 1, 7]
    np.testing.assert_array_equal(np.array(both["tokens"][:, 0, 0]), [0, 1, 7])


def test_more_can_stand_beside_and_the_first_stays_as_it_is():
    text = some()
    more = text.beside(weight=mx.ones(3), size=mx.zeros(3))
    assert {**more}.keys() == {"tokens", "mask", "size", "weight"}
    assert sizes(more) == [0, 0, 0]
    assert sizes(text) == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({}, "found none"),
        ({"tokens": mx.zeros((2, 3)), "pooled": mx.zeros((1, 3))}, r"found tokens \[2, 3\], pooled \[1, 3\]"),
        ({"scale": mx.array(3.0)}, r"found scale \[\]"),
        ({"tokens": mx.zeros((2, 3)), "scale": mx.array(3.0)}, "same number of rows"),
    ],
)
def test_what_has_no_rows_or_others_is_refused(rows, found):
    with pytest.raises(AdapterError, match=found):
        Conditioning(**rows)


@pytest.mark.parametrize("other", [{"tokens": mx.zeros((1, 9, 5))}, {"pooled": mx.zeros((1, 4, 5))}])
def test_what_does_not_fit_is_not_joined(other):
    with pytest.raises(AdapterError, match=r"cannot be joined.*pad"):
        Conditioning(tokens=mx.zeros((2, 4, 5))).joined(Conditioning(**other))


def test_more_rows_beside_are_refused():
    with pytest.raises(AdapterError, match="same number of rows"):
        some().beside(weight=mx.ones(2))
