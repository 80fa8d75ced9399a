"""Kill every long verb at a random moment, run it again, and compare all files with those of a run that nobody killed;
and the same with Ctrl-C, a run that sleeps, a full disk and a folder that cannot be written.

    nice python benchmarks/kill_and_resume.py --kills 300 --others 100 --seed 0 --log kills.jsonl

An accident comes after a random share of the run's time, or at a random one of its operations on files (each file that
is opened to be written, each write, rename, removal): half and half. Every third run that was killed is killed once
more before it may end. What counts:

- ``kill``: SIGKILL. The same command, given again, ends with the same bytes in every file and leaves nothing else.
- ``interrupt``: SIGINT. It ends with exit code 130 and one line, and then as after a kill.
- ``stop``: SIGSTOP. While it sleeps the same command is given a second time, which gets one clear error; SIGCONT, and
  the first ends as if nothing had been.
- ``full``: the disk is full from some operation on. One clear error, and with space again as after a kill.
- ``read-only``: nothing can be written. One clear error, and nothing has changed.

The log has a line for each accident; given again, the campaign goes on after the last one. The last line on stdout is
one JSON object; the exit code is 1 when anything went wrong.
"""

from __future__ import annotations

import os

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # before NumPy: what has threads cannot be forked

# isort: split
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from interrupted import (
    CASES,
    REFUSED,
    Accident,
    Ended,
    Once,
    contents,
    differences,
    full_disk,
    kill_at_once,
    must_succeed,
    prepare,
    read_only,
    run,
    start,
    wait,
)

OTHERS = ("interrupt", "stop", "full", "read-only")
SLOW = ("demo", "evaluate", "benchmark-final")  # they draw pictures by several models, ten times as long as the rest


@dataclass(frozen=True)
class Undisturbed:
    """A case when nothing happens: what it begins with, what it leaves, how long it takes, what it does to files."""

    before: Path
    expected: dict[str, str]
    seconds: float
    operations: int


def undisturbed(case: str, before: Path, folder: Path) -> Undisturbed:
    known = folder / f"{case}.json"
    if known.exists():
        return Undisturbed(before, **json.loads(known.read_text()))
    place, count = folder / "undisturbed", folder / "count"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(before, place)
    began = time.monotonic()
    must_succeed(CASES[case][1], place, count)
    facts = {"seconds": time.monotonic() - began, "operations": int(count.read_text()), "expected": contents(place)}
    known.write_text(json.dumps(facts))
    return Undisturbed(before, **facts)


def moment(random: np.random.Generator, whole: Undisturbed, accident: Accident) -> Accident:
    """When an accident happens: at an operation or after a time."""
    if random.random() < 0.5:
        return replace(accident, at=int(random.integers(1, whole.operations + 1)))
    return replace(accident, after=float(random.uniform(0.02, 1)) * whole.seconds)


def attempt(
    kind: str, case: str, whole: Undisturbed, folder: Path, random: np.random.Generator, at: int | None = None
) -> list[str]:
    """What went wrong in one accident of a kind; nothing, if all is well. A disk is full from operation ``at`` on."""
    place, command = folder / "accident", CASES[case][1]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole.before, place)
    if kind == "kill":
        again = 1 + (random.random() < 1 / 3)
        for _ in range(again):
            run(command, place, moment(random, whole, Accident(kill_at_once)))
        return finished(command, place, whole)
    if kind == "interrupt":
        accident = moment(random, whole, Accident(Once(signal.SIGINT), number=signal.SIGINT))
        ended = run(command, place, accident)
        return wrong_interrupt(ended) + finished(command, place, whole)
    if kind == "full":
        at = int(random.integers(1, whole.operations + 1)) if at is None else at
        ended = run(command, place, Accident(full_disk, at=at))
        return wrong_refusal(ended, "No space left") + finished(command, place, whole)
    if kind == "read-only":
        ended = run(command, place, Accident(read_only, at=1))
        return wrong_refusal(ended, "Read-only") + differences(contents(whole.before), place)
    return asleep(command, place, whole, int(random.integers(1, whole.operations + 1)))


def asleep(command: list[str], place: Path, whole: Undisturbed, at: int) -> list[str]:
    """A run falls asleep at an operation, another one comes, and the first goes on. One of the two does the work."""
    first = start(command, place, Accident(Once(signal.SIGSTOP), at=at))
    said = place.with_suffix(".said")
    os.waitpid(first, os.WUNTRACED)
    second_said = place.with_suffix(".first")
    os.link(said, second_said)
    said.unlink()
    second = run(command, place)
    os.kill(first, signal.SIGCONT)
    os.replace(second_said, said)
    ended = wait(first, place)
    wrong = [
        f"{which} run ended with {one.code}: {one.said[-300:]}"
        for which, one in (("first", ended), ("second", second))
        if one.code and not (one.code == 1 and one.is_one_line and any(words in one.said for words in REFUSED))
    ]
    if ended.code and second.code:
        wrong.append(f"neither run did the work: {ended.said[-200:]} {second.said[-200:]}")
    return wrong + differences(whole.expected, place)


def finished(command: list[str], place: Path, whole: Undisturbed) -> list[str]:
    """What is wrong after the command was given once more. It may say that all is there already."""
    ended = run(command, place)
    wrong = []
    if ended.code and not (ended.code == 1 and ended.is_one_line and REFUSED[0] in ended.said):
        wrong.append(f"given again it ended with {ended.code}: {ended.said[-500:]}")
    return wrong + differences(whole.expected, place)


def wrong_refusal(ended: Ended, words: str) -> list[str]:
    fine = ended.code == 0 or (ended.code == 1 and ended.is_one_line and words in ended.said)
    return [] if fine else [f"ended with {ended.code} and said: {ended.said[-700:]}"]


def wrong_interrupt(ended: Ended) -> list[str]:
    lines = [line for line in ended.said.splitlines() if line.startswith("Interrupted")]
    fine = ended.code == 0 or (ended.code == 130 and len(lines) == 1)
    return [] if fine and "Traceback" not in ended.said else [f"ended with {ended.code} and said: {ended.said[-700:]}"]


def plan(kills: int, others: int, cases: list[str]) -> list[tuple[str, str]]:
    """Kind and case of every accident; cases take turns, the slow ones every fourth time."""
    quick = [case for case in cases if case not in SLOW] or cases
    turns = [*cases, *quick, *quick, *quick]
    each = [("kill", turns[index % len(turns)]) for index in range(kills)]
    rest = [(OTHERS[index % len(OTHERS)], turns[index // len(OTHERS) % len(turns)]) for index in range(others)]
    return each + rest


@click.command()
@click.option("--kills", default=300, show_default=True, type=click.IntRange(0), help="How often SIGKILL is sent.")
@click.option("--others", default=100, show_default=True, type=click.IntRange(0), help="How many of all other kinds.")
@click.option("--every", is_flag=True, help="After that, the disk is full from each single operation on.")
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="These cases.  [default: all]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides on the moments.")
@click.option("--log", "log", type=click.Path(path_type=Path), help="A line for each accident; to go on from.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to go on in.  [default: a temporary one]")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for what was left where something went wrong.")
def main(
    kills: int,
    others: int,
    every: bool,
    only: tuple[str, ...],
    seed: int,
    log: Path | None,
    work: Path | None,
    keep: Path | None,
) -> None:
    """Kill, resume, compare."""
    cases = list(only) or list(CASES)
    done: dict[str, dict[str, Any]] = {}
    if log is not None and log.exists():
        done = {str(row["index"]): row for row in map(json.loads, log.read_text().splitlines())}
    wholes: dict[str, Undisturbed] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = work or Path(name)
        begin = prepare(folder / "begin", cases)
        accidents: list[tuple[str, str, str, int | None]] = [
            (str(index), kind, case, None) for index, (kind, case) in enumerate(plan(kills, others, cases))
        ]
        for case in cases if every else ():
            wholes[case] = undisturbed(case, begin[case], folder)
            accidents += [(f"{case} {at}", "full", case, at) for at in range(1, wholes[case].operations + 1)]
        for index, kind, case, at in accidents:
            if index in done:
                continue
            if case not in wholes:
                wholes[case] = undisturbed(case, begin[case], folder)
            random = np.random.default_rng([seed, int(index) if at is None else at])
            wrong = attempt(kind, case, wholes[case], folder, random, at)
            done[index] = {"index": index, "kind": kind, "case": case, "wrong": wrong}
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(done[index]) + "\n")
            if wrong:
                click.echo(f"{index} {kind} {case}: {'; '.join(wrong)}", err=True)
                if keep is not None:
                    shutil.copytree(folder / "accident", keep / index, dirs_exist_ok=True)
    rows = list(done.values())
    counts = {kind: Counter(bool(row["wrong"]) for row in rows if row["kind"] == kind) for kind in ("kill", *OTHERS)}
    facts = {kind: {"accidents": count.total(), "wrong": count[True]} for kind, count in counts.items()}
    click.echo(f"{'kind':<12}{'accidents':>10}{'wrong':>7}", err=True)
    for kind, fact in facts.items():
        click.echo(f"{kind:<12}{fact['accidents']:>10}{fact['wrong']:>7}", err=True)
    click.echo(json.dumps({"cases": len(cases), "seed": seed, **facts}))
    sys.exit(1 if any(fact["wrong"] for fact in facts.values()) else 0)


if __name__ == "__main__":
    main()
