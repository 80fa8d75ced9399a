"""What click says of arguments that it does not understand, which are quoted however long they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..errors import LIMIT, shortened


@contextmanager
def short_usage_errors() -> Iterator[None]:
    """An error of click's about arguments is as long as our own at most."""
    try:
        yield
    except click.UsageError as error:
        if len(said := error.format_message()) <= LIMIT:
            raise
        raise click.UsageError(shortened(said), error.ctx) from error
