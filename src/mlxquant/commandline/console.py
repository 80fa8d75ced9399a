"""How commands talk: progress and tables on stderr for people, one JSON object as the last line of stdout for
programs.

Both know who listens. On a terminal a bar is drawn again and again and the JSON object is left out, unless --json asks
for it; in a log file a bar is a line every ten seconds, and where stdout leads to a program the object is always there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import click
import mlx.core as mx
from tqdm import tqdm

from .._interrupt import INTERRUPTED, raise_when_interrupted
from ..errors import MlxQuantError
from ..files.explain import explain
from .usage import short_usage_errors

Entered = TypeVar("Entered")
JSON = "mlxquant.json"  # in click's ``Context.meta``: whether --json was given
LOG_SECONDS = 10.0  # between two lines of a bar in a log file


class Command(click.Command):
    """A command whose expected errors are one line and exit code 1, that can be interrupted, and that has --json."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--json"],
                is_flag=True,
                expose_value=False,
                callback=_ask_for_json,
                help="Print the result as one line of JSON also where stdout is a terminal.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with short_usage_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        raise_when_interrupted()
        try:
            return super().invoke(ctx)
        except MlxQuantError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:  # a path that could not even be looked at
            raise click.ClickException(str(explain(error, Path(error.filename or "")))) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Run the same command again to go on.", err=True)
            ctx.exit(INTERRUPTED)


def during_command(manager: AbstractContextManager[Entered]) -> Entered:
    """Enter a context now, and leave it when the command that runs ends, however it does."""
    return click.get_current_context().with_resource(manager)


def _ask_for_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta[JSON] = value


def json_asked() -> bool:
    """Whether the command that runs was given --json."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(JSON))


def progress(
    items: Iterable[Any], label: str, *, done: int = 0, note: Callable[[], str] | None = None
) -> Iterator[Any]:
    """Report on stderr how far an iteration is: a bar on a terminal, which leaves no trace; elsewhere a line every
    ``LOG_SECONDS``, and none where all is done sooner.

    Args:
        items: What is iterated over. Without a length there is no percentage.
        label: What is being done.
        done: How many items were done before ``items``, by a run that this one resumes.
        note: What else to say, such as a loss; asked after each item.
    """
    total = done + len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        yield from _drawn(items, label, done, total, note)
    else:
        yield from _logged(items, label, done, total, note)


def _drawn(
    items: Iterable[Any], label: str, done: int, total: int | None, note: Callable[[], str] | None
) -> Iterator[Any]:
    with tqdm(
        items, label, total, leave=False, file=sys.stderr, mininterval=0.2, dynamic_ncols=True, initial=done
    ) as bar:
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)


def _logged(
    items: Iterable[Any], label: str, done: int, total: int | None, note: Callable[[], str] | None
) -> Iterator[Any]:
    began = said = time.monotonic()
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - said >= LOG_SECONDS:
            said = now
            words = "" if note is None else note()
            say(tqdm.format_meter(count, total, now - began, 0, label, postfix=words, initial=done))


def say(text: str) -> None:
    """A line for people, above the bars that are being drawn."""
    with tqdm.external_write_mode(file=sys.stderr):
        click.echo(text, err=True)


def result(facts: dict[str, Any]) -> None:
    """The line for programs; a terminal gets it only when --json asks."""
    if json_asked() or not sys.stdout.isatty():
        click.echo(json.dumps(facts, sort_keys=True, allow_nan=False))


def peak_bytes() -> int:
    """The most memory of this process so far: resident, or MLX's own where that is more, for Metal's buffers may not be
    resident.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(resident if sys.platform == "darwin" else resident * 1024, mx.get_peak_memory())
