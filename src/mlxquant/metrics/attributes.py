"""How many of the attributes that prompts ask for (a colour, a shape, a place) their pictures show.

A model that can tell marks each picture: attribute by attribute, whether it is there. All attributes count alike, so
that a prompt that asks for six weighs more than one that asks for five; means, intervals and differences all pool them
in this way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

Marks = Mapping[str, bool]  # of one picture; a second attribute of a kind is numbered: colour, colour_2
_NUMBER = re.compile(r"_\d+$")


def accuracy(marks: Sequence[Marks]) -> dict[str, float]:
    """The share of attributes that pictures show.

    Args:
        marks: Of every picture, at least one attribute each.

    Returns:
        A share in [0,1] by kind of attribute, kinds sorted, and at last the ``mean`` over all attributes.
    """
    kinds: dict[str, list[bool]] = {}
    for picture in marks:
        for name, shown in picture.items():
            kinds.setdefault(_NUMBER.sub("", name), []).append(shown)
    table = {kind: float(np.mean(shown)) for kind, shown in sorted(kinds.items())}
    return table | {"mean": float(np.mean([one for shown in kinds.values() for one in shown]))}


def shares(marks: Sequence[Marks]) -> tuple[list[float], list[int]]:
    """What each picture shows of what it was asked for, in [0,1], and how many attributes that were: the weight of its
    share in the mean.
    """
    return [float(np.mean(list(picture.values()))) for picture in marks], [len(picture) for picture in marks]
