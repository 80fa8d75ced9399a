"""Does the suite notice when the code is wrong? Every mistake of a list is made, one at a time, and the tests that are
to notice it are run.

    python benchmarks/mutants.py --work WORK

``mutants.toml`` has the list. Its tables go by file, each with the tests that know the file and with its mutants: what
stands there, once in the file, what to put in its place, perhaps other tests, and a reason where no test can tell the
two apart. A mutant is *killed* when a test fails, or does not come to an end; otherwise it *survives*.

The tree is copied, and mutants are made in the copy: whoever stops the program leaves nothing behind. A row a mutant is
kept in WORK.jsonl, and a run that was stopped goes on where it was: a mutant is run again when its entry, its file or
one of its tests has changed. At the end all tests that killed have to pass on the copy as it is. The last line on
stdout is one JSON object; the exit code is 1 where a mutant without a reason survives, or more than 3 % do.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy  # noqa: F401  # for the forks
import pytest

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.commandline.console import progress, result, say
from rows import Rows

REPOSITORY = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
PACKAGE, TESTS = "src/mlxquant", "tests"
SURVIVING = 0.03  # the share that may survive
PASSED, FAILED = 0, 1  # pytest's exit codes
PATIENCE = 20  # times the limit: a machine that is busy with other things is no reason to call a mutant killed
TIME = "time"  # killed a mutant whose tests came to no end


@dataclass(frozen=True)
class Mutant:
    """A mistake: ``old`` text of ``file``, in the package, becomes ``new``. ``tests`` are pytest's ids, in the folder
    of tests; with a ``reason`` it may survive.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    @property
    def title(self) -> str:
        return f"{self.file}: {self.name}"

    def applied(self, text: str) -> str:
        """The file's text with the mistake in it; ValueError where ``old`` is not there exactly once, SyntaxError where
        what comes out is no program.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.title}: {self.old!r} stands there {count} times, expected once")
        mutated = text.replace(self.old, self.new)
        ast.parse(mutated)
        return mutated

    def state(self, repository: Path) -> str:
        """A digest of all that the verdict is taken to depend on."""
        files = sorted({f"{PACKAGE}/{self.file}", *(f"{TESTS}/{test.partition('::')[0]}" for test in self.tests)})
        texts = [(repository / name).read_text(encoding="utf-8") for name in files]
        return hashlib.sha256(repr([self, *texts]).encode()).hexdigest()[:16]


def read(file: Path = LIST) -> list[Mutant]:
    """The list, in its order. TypeError on keys that a mutant does not have, ValueError on two of one name."""
    mutants: list[Mutant] = []
    for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items():
        for entry in table["mutants"]:
            tests = tuple(entry.pop("tests", table["tests"]))
            mutants.append(Mutant(file=name, tests=tests, **entry))
    if len({mutant.title for mutant in mutants}) < len(mutants):
        raise ValueError("two mutants of a file have one name")
    return mutants


def copy_tree(repository: Path, to: Path) -> None:
    """What git tracks, or would, as it is now; compiled, so that only a file with a mistake in it is compiled again.

    A mistake that is as long as what it replaces, made in the same second, looks the same to a time stamp: what was
    compiled goes by a hash of the text, also where Python compiles it anew.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (repository / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, to / name)
    compiled = ["compileall", "-q", "--invalidation-mode", "checked-hash", PACKAGE]
    subprocess.run([sys.executable, "-m", *compiled], cwd=to, check=True)


def run_tests(tree: Path, tests: Sequence[str], limit: float = inf) -> tuple[int | None, str]:
    """pytest's exit code, None where it takes more than ``limit`` seconds of CPU time or ``PATIENCE`` times as long,
    and the first test that failed, without its parameters.

    They run in a fork of this process, which has pytest and NumPy already: that is half of what an interpreter, pytest
    and the package take to start (0.55 s of CPU time, of 0.9 s for a mutant in the middle).
    """
    with tempfile.TemporaryFile("w+") as said:
        if (child := os.fork()) == 0:
            _be_pytest(tree, tests, said.fileno(), limit)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        text = said.read()
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return None, ""
    failed = (line.split()[1].partition("[")[0] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return code, next(failed, text[-400:] if code else "")


def _be_pytest(tree: Path, tests: Sequence[str], said: int, limit: float) -> NoReturn:
    """Run tests and end, in a process that was forked: on the package and in the folder of the copy."""
    code = -1
    try:
        if limit < inf:
            signal.setitimer(signal.ITIMER_PROF, limit)  # ends it also in a loop that is none of Python's
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * limit)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 (the process ends)
        os.chdir(tree)
        source = str(tree / "src")
        os.environ["PYTHONPATH"] = source  # for what tests start
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others' plugins, which take time to import
        ours = {str(REPOSITORY / "src"), str(REPOSITORY / "benchmarks")}
        sys.path[:] = [source, *(place for place in sys.path if place not in ours)]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mlxquant", "rows")]:
            if name != "mlxquant._blas":  # which has to come before MLX, and has
                del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        code = int(pytest.main([*options, *(f"{TESTS}/{test}" for test in tests)]))
        sys.stdout.flush()
    finally:
        os._exit(code & 0xFF)


def verdict(tree: Path, mutant: Mutant, limit: float) -> dict[str, Any]:
    """What became of a mutant in a copy of the tree, which is afterwards as it was."""
    file = tree / PACKAGE / mutant.file
    text, started = file.read_text(encoding="utf-8"), time.perf_counter()
    try:
        file.write_text(mutant.applied(text), encoding="utf-8")
        code, by = run_tests(tree, mutant.tests, limit)
    finally:
        file.write_text(text, encoding="utf-8")
    if code not in (PASSED, FAILED, None):
        raise click.ClickException(f"{mutant.title}: pytest ended with {code}, and not by a test that failed: {by}")
    by = by.removeprefix(f"{TESTS}/")
    seconds = round(time.perf_counter() - started, 1)
    return {"killed": code != PASSED, "by": by if code is not None else TIME, "seconds": seconds}


def require_passing(tree: Path, mutants: Sequence[Mutant], found: dict[str, dict[str, Any]]) -> None:
    """The tests that killed pass as long as nothing is wrong; ClickException on the first that does not."""
    tests: set[str] = set()
    for mutant in mutants:
        row = found[mutant.title]
        tests |= set(mutant.tests if row["by"] == TIME else [row["by"]] if row["killed"] else [])
    say(f"{len(tests)} tests that killed, without any mistake")
    code, by = run_tests(tree, sorted(tests))
    if code != PASSED:
        raise click.ClickException(f"a test fails without any mistake: {by}; remove the rows that it killed")


def summary(mutants: Sequence[Mutant], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    survivors = [mutant for mutant in mutants if not found[mutant.title]["killed"]]
    folders: dict[str, int] = {}
    for mutant in mutants:
        folder = mutant.file.partition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    return {
        "mutants": len(mutants),
        "killed": len(mutants) - len(survivors),
        "survived": len(survivors),
        "percent": round(100 * len(survivors) / len(mutants), 2),
        "without_reason": [mutant.title for mutant in survivors if not mutant.reason],
        "folders": folders,
        "seconds": round(sum(found[mutant.title]["seconds"] for mutant in mutants), 1),
    }


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
@click.option("--only", multiple=True, help="A part of the titles of the mutants to run; may be repeated.")
@click.option(
    "--limit", default=60.0, show_default=True, help="CPU seconds after which tests are taken to have noticed."
)
def main(work: Path, only: tuple[str, ...], limit: float) -> None:
    mutants = [mutant for mutant in read() if not only or any(part in mutant.title for part in only)]
    if not mutants:
        raise click.ClickException(f"no mutant's title has any of {only}")
    kept, states = Rows(work, suite=TESTS), {mutant.title: mutant.state(REPOSITORY) for mutant in mutants}
    known = kept.figures()
    left = [mutant for mutant in mutants if known.get(mutant.title, {}).get("state") != states[mutant.title]]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(REPOSITORY, tree)
        for mutant in progress(left, "mutants"):
            row = verdict(tree, mutant, limit)
            kept.keep(mutant.title, {**row, "state": states[mutant.title]})
            if not row["killed"]:
                say(f"survives: {mutant.title}" + (f" ({mutant.reason})" if mutant.reason else ""))
        require_passing(tree, mutants, kept.figures())
    facts = summary(mutants, kept.figures())
    result(facts)
    if facts["without_reason"] or facts["survived"] > SURVIVING * len(mutants):
        sys.exit(1)


if __name__ == "__main__":
    main()
