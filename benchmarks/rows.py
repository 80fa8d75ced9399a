"""The rows that benchmarks keep, so that a run that was killed goes on where it was: one JSON-lines file a benchmark.

A line is a row: its ``name``, ``of`` what it was measured (the model's fingerprint, how many prompts, ...), then its
figures, numbers before lists. Lines are sorted by ``of`` and name, so that a new row is one new line in a diff. A row
is added by writing the whole file under another name and renaming it: whoever reads it finds it whole, and processes
that share it wait for each other.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mlxquant.files.atomic import atomic_file

SUFFIX = ".jsonl"


class Rows:
    """The rows of ``WORK.jsonl`` that are of one model and one size of the benchmark.

    Args:
        work: What ``--work`` says: ``WORK`` or ``WORK.jsonl``; a file that is not there has no rows.
        of: What the rows were measured of; rows of anything else are left as they are.
    """

    def __init__(self, work: Path, **of: Any):
        work = work.resolve()
        self.file = work if work.suffix == SUFFIX else work.with_name(work.name + SUFFIX)
        self.of = of

    def folder(self) -> Path:
        """A folder, made now, for what takes more room than a row: ``WORK/`` and what the rows are of."""
        folder = self.file.with_suffix("") / "-".join(str(value) for _, value in sorted(self.of.items()))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of each row by its name, sorted by name."""
        return {row["name"]: without_head(row) for row in read(self.file) if row["of"] == self.of}

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a row that is there, or made and kept now; either way as JSON has them."""
        found = self.figures()
        if name not in found:
            self.keep(name, make())
            found = self.figures()
        return found[name]

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Write a row into the file, in the place of one that has the same name and is of the same."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.file.parent):
            others = [row for row in read(self.file) if (row["name"], row["of"]) != (name, self.of)]
            write(self.file, [*others, {"name": name, "of": self.of, **figures}])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # given back on closing, by a killed process too
        yield
    finally:
        os.close(handle)


def read(file: Path) -> list[dict[str, Any]]:
    """All rows of a file, none where it is missing; ClickException on a line that is not a row."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"name", "of"} <= row.keys():
            raise click.ClickException(f"{file}: line {number} is no row; expected a JSON object with name and of")
        rows.append(row)
    return rows


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The whole file, at once: rows sorted, equal rows give equal bytes."""
    keyed = sorted(rows, key=lambda row: (json.dumps(row["of"], sort_keys=True), row["name"]))
    with atomic_file(file) as temporary:
        temporary.write_text("".join(line(row) + "\n" for row in keyed), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """A row as JSON: name, of, then numbers, then lists, each sorted."""
    figures = sorted(without_head(row).items(), key=lambda item: (isinstance(item[1], list | dict), item[0]))
    ordered = {"name": row["name"], "of": dict(sorted(row["of"].items())), **dict(figures)}
    return json.dumps(ordered, ensure_ascii=False, allow_nan=False)


def without_head(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("name", "of")}
