"""Change files and texts in every way that comes to mind, make their checksums right, read them, and judge what comes
of it.

    python benchmarks/fuzz.py --seed 0 --work fuzz

Right is what loads, and what is refused by one MlxQuantError: one line of at most 500 characters. The mutations are
those of ``tests/fuzz``, of every kind of file that mlxquant writes or reads, and of recipes and overrides; a seed and a
number name one, and ``--only NUMBER`` does it again. They run in processes that may grow by 1 GiB and take 60 seconds
for a mutation: one that dies, hangs or needs more has failed. What was done is kept in ``--work``, so that a killed
campaign goes on. The last line on stdout is one JSON object; the exit code is 1 when anything failed.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.commandline.console import progress, result, say

TESTS = Path(__file__).parents[1] / "tests"
GROWTH, SECONDS = 2**30, 60.0  # of a process beyond what it takes to begin with; for a mutation
sys.path.insert(0, str(TESTS))


class Worker:
    """A process that does mutations, one after the other; it is replaced where one of them ends it."""

    def __init__(self, pristine: Path, seed: int, errors: Path):
        self._command = [sys.executable, __file__, "--serve", str(pristine), "--seed", str(seed)]
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def attempt(self, number: int) -> dict[str, object]:
        """The outcome of a mutation, as the process reports it, or as it is seen from here where it does not."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors.open("w"), text=True
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        start = time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            return {**json.loads(line), "seconds": time.monotonic() - start}
        process.kill()
        ended = f"took more than {SECONDS:g} s" if not ready else f"ended the process ({process.wait()})"
        process.wait()
        self._process = None
        said = f"{ended}: {self._errors.read_text(errors='replace')[-1000:]}"
        return {"number": number, "of": "?", "done": "?", "verdict": "failed", "said": said, "seconds": SECONDS}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve(pristine: Path, seed: int) -> None:
    """Do the mutations whose numbers come in on stdin, and report each by a line on stdout."""
    from fuzz.campaign import attempt

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no outcome
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        attempt(0, seed, pristine, Path(folder) / "files")  # what is imported and kept on the way is no growth
        limit = _address_space() + GROWTH
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for line in sys.stdin:
            out.write(json.dumps(attempt(int(line), seed, pristine, Path(folder) / "files").to_dict()) + "\n")
            out.flush()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the campaign.")
@click.option("--count", default=10000, show_default=True, help="Mutations.")
@click.option("--only", type=int, multiple=True, help="Do these numbers alone, and print what came of them.")
@click.option("--work", type=click.Path(path_type=Path), required=False, help="Keeps the files and what was done.")
@click.option("--serve", "served", type=click.Path(path_type=Path), hidden=True)
def command(seed: int, count: int, only: tuple[int, ...], work: Path | None, served: Path | None) -> None:
    """Change what mlxquant reads and judge what comes of it."""
    if served is not None:
        return serve(served, seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = work or Path(temporary)
        pristine, log = folder / "pristine", folder / f"outcomes-{seed}.jsonl"
        if not (folder / "written").exists():
            from fuzz.artifacts import write_all

            say("writing one of everything")
            write_all(pristine)
            (folder / "written").touch()
        done = {}
        if log.exists() and not only:
            done = {outcome["number"]: outcome for outcome in map(json.loads, log.read_text().splitlines())}
        worker = Worker(pristine, seed, folder / "errors.txt")
        left = only or [number for number in range(count) if number not in done]
        try:
            with log.open("a") as file:
                for number in progress(left, "mutations", done=len(done)):
                    done[number] = outcome = worker.attempt(number)
                    if only or outcome["verdict"] == "failed":
                        say(json.dumps(outcome, indent=1).replace("\\n", "\n"))
                    if not only:
                        file.write(json.dumps(outcome) + "\n")
                        file.flush()
        finally:
            worker.stop()
        outcomes = [done[number] for number in (only or range(count))]
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    result(
        {
            "mutations": len(outcomes),
            "seed": seed,
            **{verdict: verdicts[verdict] for verdict in ("loaded", "refused", "failed")},
            "kinds": len({outcome["of"] for outcome in outcomes}),
            "longest_message": max((len(o["said"]) for o in outcomes if o["verdict"] == "refused"), default=0),
            "slowest_seconds": round(max(outcome["seconds"] for outcome in outcomes), 1),
            "failures": [outcome["number"] for outcome in outcomes if outcome["verdict"] == "failed"],
        }
    )
    if verdicts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    command()
