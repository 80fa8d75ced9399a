"""What the campaign of kills and faults is made of: every long verb on tiny settings, a process that runs one of them
and meets an accident, and what has to be there afterwards.

Imports take longer than these runs, so they happen once: whoever imports this module has all verbs in memory, and a run
is a fork of it. That is safe because nothing has been computed yet, so that there is one thread: MLX and BLAS start
theirs when they are first used.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import mlxquant  # before mlx

# isort: split
import matplotlib.backends.backend_agg  # what draws, which verbs import late
import matplotlib.figure
import mlx.core as mx
import numpy as np
from PIL import Image, PngImagePlugin

from mlxquant import _interrupt
from mlxquant.commandline.cli import MODULES, VERBS, main
from mlxquant.evaluation import cost, report_folder
from mlxquant.files import training_run
from mlxquant.files.atomic import atomic_file
from mlxquant.files.checked import file_digest
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.sweep import store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.small_gpt import SMALL, TEXT
from support.tiny_pictures import tiny_adapter

for verb in VERBS:
    import_module(f"mlxquant.{MODULES.get(verb, verb.replace('-', '_'))}")

PROMPT = "a large red circle at left on white background"
DRAW = ["--num-prompts", "2", "--steps", "2"]
LEARN = [*SMALL, "--max_iters", "12", "--data", "text.txt", "--linear_variant_attn", "quantized_linear"]
STEPS = {  # what later cases start from: the command, and what it leaves
    "calib": (["generate-calibration-data", "--model", "mmdit-shapes", "--num-images", "2", "--num-steps", "3",
               "--cfg-weight", "2", "--calib-dir", "calib"], "calib"),
    "cache": (["cache-adaround-data", "--calib-dir", "calib", "--num-images", "2", "--stride", "1"],
              "calib/adaround_cache"),
    "activations": (["collect-layer-activations", "--calib-dir", "calib", "--num-images", "2", "--stride", "1"],
                    "calib/activations"),
    "config": (["analyze-activations", "--stats", "calib/activations/layer_statistics.json"], "calib/activations"),
    "weights": (["adaround-optimize", "--cache-dir", "calib/adaround_cache", "--output-dir", "weights", "--iters",
                 "4"], "weights"),
    "model": (["quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w8a8", *DRAW, "--out", "model"], "model"),
    "gpt": (["train-gpt", *LEARN, "--out_dir", "gpt"], "gpt"),
}  # fmt: skip
CASES = {  # by name: the steps that come before, and the command
    **{f"{command[0]}": (list(STEPS)[:place] if place < 5 else [], command)
       for place, (command, _) in enumerate(STEPS.values())},
    "quantize": ([], ["quantize", "--model", "mmdit-shapes", "--recipe", "gptq+learned-w4a8", "--iters", "4", *DRAW,
                      "--out", "q"]),
    "quantize with allocation": ([], ["quantize", "--model", "mmdit-shapes", "--recipe", "gptq-w4a8",
                                      "--bits-per-weight", "5", *DRAW, "--out", "q"]),
    "quantize in rounds": ([], ["quantize", "--model", "mmdit-shapes", "--recipe", "gptq+progressive-w4a8", *DRAW,
                                "--out", "q"]),
    "quantize a language model": (["gpt"], ["quantize", "--model", "gpt", "--recipe", "gptq-w4a8", "--samples", "8",
                                            "--length", "16", "--data", "text.txt", "--out", "q"]),
    "calibrate-snr": ([], ["calibrate-snr", *DRAW, "--save-path", "q"]),
    "quantize-qronos": ([], ["quantize-qronos", *DRAW, "--save-path", "q"]),
    "load-adaround-model": (["calib", "cache", "activations", "config", "weights"], [
        "load-adaround-model", "--adaround-output", "weights", "--quant-config",
        "calib/activations/quant_config.json", "--prompt", PROMPT, "--num-steps", "2", "--output-image", "a.png",
        "--compare", "--diff-stats", "--save", "q", "--force"]),
    "save-weights": (["gpt"], ["save-weights", "--out_dir", "gpt", "--file_name", "w", "--force"]),
    "generate": (["model"], ["generate", "--model", "model", "--prompt", PROMPT, "--steps", "2", "--output", "a.png"]),
    "evaluate": (["model"], ["evaluate", "--model", "mmdit-shapes", "--model", "model", "--recipe", "rtn-w4a8", *DRAW,
                             "--num-calibration-prompts", "2", "--out", "report"]),
    "benchmark-final": (["model"], ["benchmark-final", "model", *DRAW, "--out", "report"]),
    "export": (["model"], ["export", "--model", "model", "--target", "mlx", "--out", "exported"]),
    "demo": ([], ["demo", *DRAW, "--out", "demo"]),
    "visualize": (["model"], ["visualize", "model", "--weight", "*.0.image*.q_proj.*", "--out", "drawn"]),
    "compare-images": ([], ["compare-images", "one", "two", "--out", "report"]),
}  # fmt: skip
# clocks and memory say something else in every run
MEASURED = {"seconds", "seconds_quantize", "sha256", *cost.MEASURED}
ONLY_THERE = ("report.html", "report.csv")  # and so do the files that show them
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "tempfile.mkstemp"}
REFUSED = ("exists; choose another folder", "is writing it")


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: the signal that ended it), and what it said on stderr."""

    code: int
    said: str

    @property
    def is_one_line(self) -> bool:
        """Whether it says in one line why it did not do what was asked, as every expected error is."""
        errors = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        return len(errors) == 1 and "Traceback" not in self.said and "Exception ignored" not in self.said


class Operations:
    """Counts what this process does to files below its working folder, and lets ``accident`` happen at one of them.

    Python tells of every file that is opened for writing, made, renamed or removed before that happens (audit events);
    writes into open files are seen by files of our own.
    """

    def __init__(self, at: int = 0, accident: Callable[[str], None] = lambda event: None):
        self.count, self._at, self._accident = 0, at, accident
        self._root = os.getcwd()
        sys.addaudithook(self._hear)
        self._open = io.open
        io.open = builtins.open = self._opened

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes)) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        else:
            path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.fsdecode(path)
            if os.path.isabs(place) and not place.startswith(self._root):
                return
            self.happens(event)

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
        if isinstance(file, int) or "opener" in options or not set("wax+") & set(mode) or not self._is_ours(file):
            return self._open(file, mode, buffering, *more, **options)
        raw = _Watched(file, mode.replace("b", "").replace("t", ""))
        raw.operations = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        names = ("encoding", "errors", "newline")
        return io.TextIOWrapper(buffered, **dict(zip(names, more, strict=False)), **options)

    def _is_ours(self, file: Any) -> bool:
        return os.path.abspath(os.fsdecode(file)).startswith(self._root)

    def happens(self, event: str) -> None:
        """Count an operation that is about to be done; the accident is at the one with number ``at``."""
        self.count += 1
        if self.count >= self._at > 0:
            self._accident(event)


class _Watched(io.FileIO):
    operations: Operations

    def write(self, data: Any, /) -> int:
        self.operations.happens("write")
        return super().write(data)


def kill_at_once(event: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Once:
    """A signal to oneself, once."""

    def __init__(self, number: signal.Signals):
        self._number, self._sent = number, False

    def __call__(self, event: str) -> None:
        if not self._sent:
            self._sent = True
            os.kill(os.getpid(), self._number)


def full_disk(event: str) -> None:
    """From now on nothing can be made or written; what is there can be renamed and removed."""
    if event in ("write", "open", "os.mkdir", "os.link", "tempfile.mkstemp"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(event: str) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@dataclass(frozen=True)
class Accident:
    """What happens at which operation on files (1 is the first), or after how many seconds; 0: never."""

    happens: Callable[[str], None] = kill_at_once
    at: int = 0
    after: float = 0.0
    number: signal.Signals = signal.SIGKILL  # the signal that is sent ``after`` so many seconds


def start(arguments: list[str], folder: Path, accident: Accident, report: Path | None = None) -> int:
    """A run in ``folder`` as a fork of this process; its id. Its operations are counted in the file ``report``."""
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("this process has threads, so it cannot be forked; nothing may be computed in it")
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        _make_small(8 if arguments[0] == "demo" else 1)  # which draws 16 prompts at least
        signal.signal(signal.SIGINT, _interrupt._leave)  # as when a command is started
        operations = Operations(accident.at, accident.happens)
        try:
            main(arguments, prog_name="mlxquant")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        if report is not None:
            fd = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(fd, str(operations.count).encode())
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _make_small(batch: int) -> None:
    """The tiny model, ``batch`` pictures at a time, and checkpoints as often as there can be any."""
    MMDiTShapes.pretrained = classmethod(lambda cls, *place: tiny_adapter())
    MMDiTShapes.batch = batch
    cost.ROUNDS = 1
    report_folder.write_page = _short_page
    store.INTERVAL = training_run.INTERVAL = 0.0
    mx.disable_compile()


def _short_page(folder: Path) -> Path:
    """Of the page only that it is written: its plots take longer than all else."""
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_text("<!doctype html>")
    return folder / "report.html"


def wait(child: int, folder: Path, seconds: float = 0.0, number: int = signal.SIGKILL) -> Ended:
    """How a run ends, which after ``seconds`` gets a signal."""
    deadline = time.monotonic() + seconds
    while seconds and time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.002)
    else:
        if seconds:
            os.kill(child, number)
        _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), folder.with_suffix(".said").read_text(errors="replace"))


def run(arguments: list[str], folder: Path, accident: Accident | None = None, report: Path | None = None) -> Ended:
    """A run from start to end."""
    accident = accident or Accident()
    return wait(start(arguments, folder, accident, report), folder, accident.after, accident.number)


def prepare(folder: Path, only: list[str]) -> dict[str, Path]:
    """What the cases begin with, by case; raises click.ClickException where a run that nothing disturbs fails."""
    ground = folder / "ground"
    shutil.rmtree(ground, ignore_errors=True)
    ground.mkdir(parents=True)
    (ground / "text.txt").write_text(TEXT)
    draws = np.random.default_rng(0)
    for name in ("one", "two"):
        (ground / name).mkdir()
        for picture in range(3):
            Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(ground / name / f"{picture}.png")
    needed = {step for case in only for step in CASES[case][0]}
    states, begin = {(): ground}, {}
    for case in only:
        steps: tuple[str, ...] = ()
        for step in CASES[case][0]:
            if step not in needed:
                continue
            before, steps = states[steps], (*steps, step)
            if steps not in states:
                states[steps] = place = folder / "-".join(steps)
                if not place.exists():  # made by a campaign that this one goes on from
                    making = folder / "making"
                    shutil.rmtree(making, ignore_errors=True)
                    shutil.copytree(before, making)
                    must_succeed(STEPS[step][0], making)
                    making.rename(place)
        begin[case] = states[steps]
    return begin


def must_succeed(arguments: list[str], folder: Path, report: Path | None = None) -> None:
    if (ended := run(arguments, folder, report=report)).code:
        raise click.ClickException(f"{' '.join(arguments)} ended with {ended.code} in {folder}:\n{ended.said}")


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder, by path: folders, and of every file its checksum, without what a clock has measured."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
        elif path.name in ONLY_THERE:
            found[name] = "there" if path.stat().st_size else "empty"
        elif path.suffix == ".json":
            found[name] = json.dumps(lasting(json.loads(path.read_text())), sort_keys=True)
        else:
            found[name] = file_digest(path)
    return found


def lasting(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: lasting(value) for key, value in data.items() if key not in MEASURED}
    return [lasting(value) for value in data] if isinstance(data, list) else data


def differences(expected: Mapping[str, str], folder: Path) -> list[str]:
    """Paths that should not be there, are not there, or hold something else."""
    found = contents(folder)
    return sorted(
        f"{'left over: ' if name not in expected else 'missing: ' if name not in found else 'other: '}{name}"
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name)
    )


assert all((mlxquant, matplotlib, PngImagePlugin))
