"""How large a picture is: WIDTHxHEIGHT in pixels, or one number for a square."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ..errors import AdapterError

PictureSize = tuple[int, int]  # width, height
LARGEST = 2**14  # pixels of a side


def picture_size(size: int | Sequence[int] | str) -> PictureSize:
    """Width and height in pixels.

    Args:
        size: One side of a square, a (width, height), or either as text: ``"512"``, ``"768x512"``.

    Raises:
        AdapterError: When it is none of these, or a side is not from 1 to 16384.
    """
    sides: Sequence[Any]
    if isinstance(size, str):
        sides = [int(side) if re.fullmatch("[0-9]{1,9}", side) else None for side in re.split("[xX×]", size.strip())]
    else:
        sides = size if isinstance(size, Sequence) else [size]
    whole = [int(side) for side in sides if _is_whole(side) and 1 <= int(side) <= LARGEST]
    if len(whole) != len(sides) or len(whole) not in (1, 2):
        raise AdapterError(
            f"{str(size)[:40]!r} is no size of a picture; expected WIDTHxHEIGHT such as 768x512, or one number for a"
            f" square, each side from 1 to {LARGEST} pixels"
        )
    return whole[0], whole[-1]


def _is_whole(side: Any) -> bool:
    return isinstance(side, Integral) and not isinstance(side, bool)


def told(size: int | Sequence[int]) -> str:
    """A size as people write it: ``512`` for a square, ``768x512`` elsewhere."""
    width, height = picture_size(size)
    return str(width) if width == height else f"{width}x{height}"


def plain(size: PictureSize) -> int | list[int]:
    """A size as plain data: one number for a square, as in earlier releases, and [width, height] elsewhere."""
    width, height = size
    return width if width == height else [width, height]
