"""What plain data from a file must be before anything is built from it: kinds, bounds, names that stay in a folder.

A checksum says that a file is as it was written, not that it was written by us. So what a reader is about to use is
held against a schema first. A schema is a function ``(value, where)`` that raises ``MismatchError``; the functions here
make them of smaller ones. Entries that a schema does not name may be there, for other releases may write more.
``files.checked`` makes a MismatchError the error about the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import shortened

Schema = Callable[[Any, str], None]
INT32 = 2**31 - 1  # MLX's sizes are int32
AXES = 8  # of an array at most
DEPTH, WIDTH = 2**10, 2**20  # of a model that is built: its blocks, and the channels of anything in it
LETTERS = 100  # of what was found, in a message
TOP = "it"  # how a message calls data that is not a part of other data
FLOAT32 = 3.4e38  # what a float32 holds


class MismatchError(ValueError):
    """Data is not what a schema says."""


def anything(value: Any, where: str) -> None:
    """What nobody builds from."""


def whole(least: int = 0, most: int = INT32) -> Schema:
    """An integer within bounds; true and false are none."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _mismatch(where, value, f"a whole number from {least} to {most}")

    return check


def number(least: float = -FLOAT32, most: float = FLOAT32) -> Schema:
    """A finite number within bounds, by default one that a float32 holds."""

    def check(value: Any, where: str) -> None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise _mismatch(where, value, f"a number from {least:g} to {most:g}")

    return check


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _mismatch(where, value, "true or false")


def text(value: Any, where: str) -> None:
    """Any text."""
    if not isinstance(value, str):
        raise _mismatch(where, value, "text")


def one_of(*values: Any) -> Schema:
    """One of these values, and of its type."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(other) and value == other for other in values):
            raise _mismatch(where, value, f"one of {', '.join(map(repr, values))}")

    return check


def maybe(schema: Schema) -> Schema:
    """As the schema says, or null."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            schema(value, where)

    return check


def either(*schemas: Schema) -> Schema:
    """As any of these says; the last one's words are the error's."""

    def check(value: Any, where: str) -> None:
        for schema in schemas[:-1]:
            try:
                return schema(value, where)
            except MismatchError:
                continue
        return schemas[-1](value, where)

    return check


def every(*schemas: Schema) -> Schema:
    """As all of these say."""

    def check(value: Any, where: str) -> None:
        for schema in schemas:
            schema(value, where)

    return check


def array_of(schema: Schema, least: int = 0, most: int = INT32) -> Schema:
    """A JSON array of so many of these."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise _mismatch(where, value, "an array")
        if not least <= len(value) <= most:
            many = f"{least} or more" if most == INT32 else f"{least} to {most}"
            raise MismatchError(f"{where} has {len(value)} entries, expected {least if least == most else many}")
        for index, inner in enumerate(value):
            schema(inner, f"{where}[{index}]")

    return check


def table_of(schema: Schema, least: int = 0, keys: Schema = text) -> Schema:
    """A JSON object whose values are all of one kind, and so are its keys."""

    def check(value: Any, where: str) -> None:
        _require_object(value, where)
        if len(value) < least:
            raise MismatchError(f"{where or TOP} has {len(value)} entries, expected {least} or more")
        for name, inner in value.items():
            keys(name, where)
            schema(inner, _below(where, name))

    return check


def entries(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """A JSON object with these entries, and perhaps with others."""

    def check(value: Any, where: str) -> None:
        _require_object(value, where)
        for name, schema in needed.items():
            if name not in value:
                raise MismatchError(f"{where or TOP} has no {name!r}")
            schema(value[name], _below(where, name))
        for name, schema in (optional or {}).items():
            if name in value:
                schema(value[name], _below(where, name))

    return check


def inside(value: Any, where: str) -> None:
    """The name of a file in the folder, or below it: a relative path without a way up."""
    text(value, where)
    ways = (PurePosixPath(value), PureWindowsPath(value))
    if not value.strip() or "\0" in value or any(way.anchor or ".." in way.parts for way in ways):
        raise MismatchError(f"{where or TOP} names {shortened(repr(value), LETTERS)}, which is not inside its folder")


shape = array_of(whole(), most=AXES)
floating = one_of("float32", "float16", "bfloat16")  # a dtype of MLX


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def json_value(data: str | bytes, constant: Callable[[str], Any] = _refuse_constant) -> Any:
    """What JSON text says, as the standard has it: raises ValueError on anything else, on halves of characters and,
    unless ``constant`` makes something of their names, on NaN and infinite numbers, too.
    """
    try:
        said = json.loads(data, parse_constant=constant)
        if (b"\\u" if isinstance(data, bytes) else "\\u") in data:  # type: ignore[operator]
            json.dumps(said, ensure_ascii=False).encode()  # nothing else can bring half of a character
        return said
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has half of a character") from error


def _below(where: str, name: str) -> str:
    """The place of an entry, as a dotted path from the top."""
    return f"{where}.{shortened(name, LETTERS)}" if where else shortened(name, LETTERS)


def _require_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _mismatch(where, value, "an object")


def _mismatch(where: str, value: Any, expected: str) -> MismatchError:
    return MismatchError(f"{where or TOP} is {_brief(value)}, expected {expected}")


def _brief(value: Any) -> str:
    """A value in a message: what is long is only named."""
    if isinstance(value, dict | list):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(repr(value), LETTERS)
