"""How commands talk: to a terminal, to a log file and to a program."""

import json
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from tqdm import tqdm

import mlxquant
from mlxquant.commandline import console
from mlxquant.commandline.console import Command, progress, result, say

COUNT = """
import sys, time
from mlxquant.commandline.console import progress, say
for i in progress(range(3), "count", done=2, note=lambda: f"loss {i}"):
    time.sleep(0.3)
say("done")
"""


def on_a_terminal(*arguments, stderr=None):
    """What a command shows on a terminal of its own, where ``stderr`` may go elsewhere."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs if stderr is None else stderr
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


@pytest.fixture
def checkpoint(tmp_path):
    np.savez(tmp_path / "a.npz", **{"w.weight": np.zeros((2, 3), np.float32)})
    return tmp_path / "a.npz"


def test_a_terminal_gets_the_json_line_only_when_it_asks(checkpoint):
    shown = on_a_terminal("-m", "mlxquant", "inspect", checkpoint)
    assert "w.weight" in shown
    assert "{" not in shown
    shown = on_a_terminal("-m", "mlxquant", "inspect", checkpoint, "--json")
    assert json.loads(shown.splitlines()[-1])["arrays_count"] == 1


def test_a_program_always_gets_it(checkpoint):
    done = subprocess.run(
        [sys.executable, "-m", "mlxquant.inspect", checkpoint], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["arrays_count"] == 1


def test_a_command_that_another_one_runs_is_asked_too(monkeypatch):
    """``calibrate-snr`` runs ``quantize``, ``benchmark-final`` runs ``evaluate``."""

    @click.command(cls=Command)
    def inner():
        result({"inner": console.json_asked()})

    @click.command(cls=Command)
    @click.pass_context
    def outer(ctx):
        ctx.invoke(inner)

    assert json.loads(CliRunner().invoke(outer, ["--json"]).stdout) == {"inner": True}
    assert json.loads(CliRunner().invoke(outer, []).stdout) == {"inner": False}


def test_a_bar_on_a_terminal_is_drawn_and_gone(tmp_path):
    shown = on_a_terminal("-c", COUNT)
    assert shown.count("\r") > 2
    assert "count" in shown
    assert "3/5" in shown
    assert "loss 1" in shown
    assert shown.rstrip().endswith("done")


def test_a_short_bar_leaves_nothing_in_a_log_file(tmp_path):
    with open(tmp_path / "log", "w") as log:
        on_a_terminal("-c", COUNT, stderr=log)
    assert (tmp_path / "log").read_text() == "done\n"


def test_a_bar_in_a_log_file_is_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in progress(range(12), "train", done=3, note=lambda: f"loss {9 / clock[0]}"):
        clock[0] += 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # after 12, 24, 36 and 48 s
    assert lines[0].startswith("train:  40% 6/15 [00:12<00:36")
    assert lines[0].endswith("loss 0.75]")
    assert "\r" not in "".join(lines)


def test_what_has_no_length_is_counted(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in progress(iter(range(2)), "read"):
        clock[0] += 11
    assert [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()] == ["read: 1it", "read: 2it"]


def test_a_bar_ends_with_what_it_counts():
    """Also where the work fails in the middle; the next line is then not on the bar's."""
    with pytest.raises(ZeroDivisionError):
        for i in progress(range(3), "fail"):
            1 / (i - 1)
    assert not getattr(tqdm, "_instances", ())
    say("after")


def test_bars_come_from_one_place():
    root = Path(mlxquant.__file__).parent
    assert [path.name for path in root.rglob("*.py") if "tqdm" in path.read_text()] == ["console.py"]
