"""Ctrl-C while a command imports: one line, and never for a program that merely uses the package."""

import signal
import subprocess
import sys
from functools import partial

import pytest

# a slow import, before which Ctrl-C comes for certain: the process sends it to itself when it asks for ``click``
SLOW = """
import os, signal, sys

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Slow())
"""
heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


def interrupted(tmp_path, arguments, handler="heard"):
    """A Python process that gets Ctrl-C when it imports click; its exit code and what it said."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    path = [str(tmp_path), *(place for place in sys.path if place)]
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": ":".join(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=heard if handler == "heard" else partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["-m", "mlxquant.quantize", "--help"], ["-mmlxquant.models.train_shapes", "--help"], ["-m", "mlxquant", "--help"]],
)
def test_one_line_instead_of_a_traceback(tmp_path, arguments):
    assert interrupted(tmp_path, arguments) == (130, "\nInterrupted before anything was begun.\n")


def test_the_script_does_the_same(tmp_path):
    """As pip writes it."""
    script = tmp_path / "mlxquant"
    script.write_text("import sys\nfrom mlxquant.commandline.cli import main\nsys.exit(main())\n")
    assert interrupted(tmp_path, [str(script), "--help"]) == (130, "\nInterrupted before anything was begun.\n")


def test_a_program_that_uses_the_package_keeps_its_signals(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import mlxquant\nimport mlxquant.commandline.console\n")
    for arguments in ([str(program)], ["-m", "program"], ["-c", program.read_text()]):
        code, said = interrupted(tmp_path, arguments)
        assert code == -signal.SIGINT
        assert said.endswith("KeyboardInterrupt\n")


def test_who_ignores_interrupts_is_not_interrupted(tmp_path):
    assert interrupted(tmp_path, ["-m", "mlxquant", "--version"], "ignored")[0] == 0
