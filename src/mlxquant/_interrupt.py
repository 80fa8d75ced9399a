"""Ctrl-C while a command is still importing: one line and exit code 130, as later.

Imports take a second, in which Python answers Ctrl-C with a traceback through whatever was being imported, or loses it
in a callback. Nothing has begun yet that would have to end well, so the process just goes. Importing this module is
enough, and only Python's own start comes before it. It is for our own commands alone: a library does not touch its
program's signals.
"""

from __future__ import annotations

# not ``signal``: its enums take as long to import as all else here
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

INTERRUPTED = 130  # exit code of what Ctrl-C ended, as shells have it


def is_command() -> bool:
    """Whether this process was started as the script ``mlxquant``, or as ``python -m mlxquant`` or one of its
    modules.
    """
    script = getattr(sys, "argv", [""])[0]
    if script != "-m":  # which is there for as long as Python looks for the module
        return os.path.basename(script) == "mlxquant"
    started = sys.orig_argv
    module = next(
        (b if a == "-m" else a[2:] for a, b in zip(started, [*started[1:], ""], strict=True) if a[:2] == "-m"), ""
    )
    return module.partition(".")[0] == "mlxquant"


def _leave(number: int, frame: object) -> None:
    os.write(2, b"\nInterrupted before anything was begun.\n")
    os._exit(INTERRUPTED)


def raise_when_interrupted() -> None:
    """As Python does it, for work that wants to end well."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# nobody has decided otherwise: a shell's background jobs, for one, ignore Ctrl-C
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
