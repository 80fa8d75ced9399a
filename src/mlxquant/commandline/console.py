"""How commands talk: progress and tables on stderr for people, one JSON object as the last line of stdout for
programs.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tqdm import tqdm

from .._blas import prefer_fast_blas
from ..errors import MlxQuantError
from ..files.atomic import explain


class Command(click.Command):
    """A command whose expected errors are one line and exit code 1, and that can be interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MlxQuantError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:  # a path that could not even be looked at
            raise click.ClickException(str(explain(error, Path(error.filename or "")))) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Run the same command again to go on.", err=True)
            ctx.exit(130)


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A progress bar on stderr that leaves no trace when it is done."""
    return tqdm(items, desc=label, file=sys.stderr, leave=False, dynamic_ncols=True, mininterval=0.2)


def say(text: str) -> None:
    """A line for people."""
    click.echo(text, err=True)


def result(facts: dict[str, Any]) -> None:
    """The line for programs."""
    click.echo(json.dumps(facts, sort_keys=True, allow_nan=False))


def peak_bytes() -> int:
    """The most memory of this process so far: resident, or MLX's own where that is more, for Metal's buffers may not be
    resident.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(resident if sys.platform == "darwin" else resident * 1024, mx.get_peak_memory())


def verbosity(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        log = logging.getLogger("mlxquant")
        log.setLevel(logging.DEBUG)
        log.debug("MLX's CPU matmul runs on %s", prefer_fast_blas() or "its own BLAS")


MODEL_HELP = "A model's name (mmdit-shapes, sd3-medium), a hub id, or a folder with its weights."
UNDERSCORES = {
    "token_normalize_func": lambda name: name.replace("_", "-")
}  # of a command's context: --out_dir is --out-dir
size_option = click.option("--size", type=click.IntRange(1), help="Pixels of a picture's side.  [default: the model's]")
force_option = click.option("--force", is_flag=True, help="Replace an existing folder.")
resume_option = click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on where a killed run of the same job was."
)
verbose_option = click.option(
    "--verbose", is_flag=True, expose_value=False, callback=verbosity, help="Say more on stderr."
)
