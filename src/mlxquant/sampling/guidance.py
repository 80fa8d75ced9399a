"""Guidance: what a model is asked at a noise level, and how its predictions become one.

Three kinds. With classifier-free guidance a model predicts twice, with the prompt and for its other side (the empty or
a negative prompt), and a weight extrapolates from one to the other. With embedded guidance the weight is one more thing
that the model reads, and it predicts once. Without guidance it predicts once, too.

Whoever shows a model what it sees while it is sampled (calibration, statistics, caches) asks here how many sides there
are, in which order their rows come and which of them share a forward pass, so that this is decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from ..files import schema
from .conditioning import Conditioning

Predict = Callable[[mx.array, Conditioning, float], mx.array]

KINDS = NONE, CLASSIFIER_FREE, EMBEDDED = ("none", "classifier-free", "embedded")
WEIGHT = "guidance"  # the row [B] float32 of a conditioning that has an embedded weight


@dataclass(frozen=True)
class Guidance:
    """How a model is guided.

    Attributes:
        weight: 0 or more.
        negative: The prompt of the other side; None for the model's own, which is the empty prompt unless its adapter
            says something else.
        kind: "none", "classifier-free" or "embedded".
        alone: Whether each row is a forward pass of its own, for models whose rows cannot be joined.

    Raises:
        AdapterError: On a weight that guidance cannot have, and on a negative prompt that nobody would read.
    """

    weight: float
    negative: str | None = None
    kind: str = CLASSIFIER_FREE
    alone: bool = False

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise AdapterError(f"cfg weight must be a finite number >= 0, found {self.weight}")
        if self.kind not in KINDS:
            raise AdapterError(f"guidance is one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.kind == NONE and self.weight != 1:
            raise AdapterError(f"this model has no guidance, found a cfg weight of {self.weight:g}; leave it out")
        if self.negative is not None and False not in sides(self):
            how = f"guidance {self.kind}" if self.kind != CLASSIFIER_FREE else "a cfg weight of 1, which is no guidance"
            raise AdapterError(
                f"a negative prompt is read by classifier-free guidance alone, found {how}; leave it out"
                + (", or choose another weight" if self.kind == CLASSIFIER_FREE else "")
            )

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data; what is as usual is not said, so that it has the same digest as in earlier releases."""
        more: dict[str, Any] = {} if self.negative is None else {"negative": self.negative}
        if self.kind != CLASSIFIER_FREE:
            more["guidance"] = self.kind
        return {"cfg": self.weight, **more, **({"alone": True} if self.alone else {})}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Guidance:
        """What ``facts`` were of; they may have other entries."""
        kind, alone = facts.get("guidance", CLASSIFIER_FREE), facts.get("alone", False)
        return cls(facts["cfg"], facts.get("negative"), kind, alone)


def _can_be(value: Any, where: str) -> None:
    try:
        Guidance.of(value)
    except AdapterError as error:
        raise schema.MismatchError(f"{where}: {error}") from error


FACTS = schema.every(  # of what a file says about guidance, among other things
    schema.entries(
        {"cfg": schema.number(0)},
        {"negative": schema.text, "guidance": schema.one_of(*KINDS), "alone": schema.flag},
    ),
    _can_be,
)


def sides(guidance: Guidance) -> tuple[bool, ...]:
    """The predictions that guidance asks of a model, in the order of their rows: True with the prompt, False for the
    other side. At weight 0 and 1 one of them is multiplied by zero, and is not asked for.
    """
    if guidance.kind != CLASSIFIER_FREE:
        return (True,)
    return (guidance.weight == 1,) if guidance.weight in (0, 1) else (True, False)


def guided_rows(pictures: Sequence[int], guidance: Guidance, side_by_side: bool = False) -> list[tuple[int, bool]]:
    """The rows of a guided batch of ``pictures``: which of them, and whether with its prompt.

    As the sampler has them, first all that have their prompt, then all that have not; ``side_by_side`` picture by
    picture.
    """
    if side_by_side:
        return [(picture, prompted) for picture in pictures for prompted in sides(guidance)]
    return [(picture, prompted) for prompted in sides(guidance) for picture in pictures]


def asked(
    latent: mx.array, text: Conditioning, other: Conditioning, guidance: Guidance, side_by_side: bool = False
) -> list[tuple[mx.array, Conditioning]]:
    """What guidance asks of a model: the latents and the conditioning of each forward pass, which is one for all rows
    unless each is ``alone``.

    Args:
        latent: [B,H,W,C].
        text: Of the prompts, B rows.
        other: Of the other side, B rows.
        guidance: How the model is guided.
        side_by_side: As for ``guided_rows``.

    Raises:
        AdapterError: When there are not as many rows as latents.
    """
    here = sides(guidance)
    given = {True: text, False: other}
    if any(len(given[side]) != len(latent) for side in here):
        found = " and ".join(str(len(given[side])) for side in here)
        raise AdapterError(f"{len(latent)} latents with a conditioning of {found} rows; expected a row for each")
    if guidance.kind == EMBEDDED:
        given[True] = text.beside(**{WEIGHT: mx.full((len(text),), guidance.weight, mx.float32)})
    rows = guided_rows(range(len(latent)), guidance, side_by_side)
    if guidance.alone:
        return [(latent[row : row + 1], given[side].take(slice(row, row + 1))) for row, side in rows]
    read = reduce(Conditioning.joined, (given[side] for side in here))
    if side_by_side:
        read = read.take(mx.array([here.index(side) * len(latent) + row for row, side in rows]))
    return [(latent[mx.array([row for row, _ in rows])], read)]


def guided(
    predict: Predict, latent: mx.array, sigma: float, text: Conditioning, other: Conditioning, guidance: Guidance
) -> mx.array:
    """The guided prediction [B,H,W,C]: for two sides ``u + weight (c - u)`` (arXiv 2207.12598) for any weight >= 0, for
    one what the model says. Arguments as for ``asked``; ``predict(latent, conditioning, sigma)`` is the model.
    """
    found = [predict(some, read, sigma) for some, read in asked(latent, text, other, guidance)]
    rows = mx.concatenate(found) if len(found) > 1 else found[0]
    if len(sides(guidance)) == 1:
        return rows
    conditional, unconditional = mx.split(rows, 2)
    return unconditional + guidance.weight * (conditional - unconditional)
