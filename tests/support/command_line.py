"""The command line in this process: what every command promises when it succeeds and when it fails."""

import json
from functools import partial

from click.testing import CliRunner

from mlxquant.commandline import cli


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def succeed(*arguments):
    """The facts on the last line of stdout, and what was said on stderr."""
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout.splitlines()[-1]), outcome.stderr


def fail(*arguments, code=None):
    """What was said on stderr; the exit code is ``code``, or any but zero."""
    outcome = run(*arguments)
    assert outcome.exit_code != 0, outcome.output
    assert code in (None, outcome.exit_code), outcome.output
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.stdout == "", outcome.output
    assert "Traceback" not in outcome.stderr, outcome.stderr
    return outcome.stderr


def of(*begin):
    """``run``, ``succeed`` and ``fail`` of commands that begin so; an expected error has exit code 1."""
    return partial(run, *begin), partial(succeed, *begin), partial(fail, *begin, code=1)
