"""Marks are pooled: one attribute is one vote."""

from mlxquant.metrics.attributes import accuracy, shares

MARKS = [
    {"colour": True, "shape": False},
    {"colour": True, "shape": True, "colour_2": False, "relation": True},
]


def test_kinds_pool_all_attributes_of_theirs():
    assert accuracy(MARKS) == {"colour": 2 / 3, "relation": 1.0, "shape": 0.5, "mean": 4 / 6}


def test_shares_weighted_by_what_was_asked_give_the_mean():
    share, asked = shares(MARKS)
    assert (share, asked) == ([0.5, 0.75], [2, 4])
    assert sum(s * n for s, n in zip(share, asked, strict=True)) / sum(asked) == accuracy(MARKS)["mean"]
