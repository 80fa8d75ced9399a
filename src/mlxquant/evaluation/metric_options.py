"""How commands are told which metrics to judge by, and where the weights of their networks are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..commandline.options import option
from ..errors import ArtifactError, RecipeError
from ..metrics import catalog
from ..metrics.catalog import Metric

metric_option = option(
    "--metric",
    "asked",
    multiple=True,
    type=click.Choice(list(catalog.METRICS)),
    help="A further metric, whose network is downloaded where it is not there yet; again for more.",
)
weights_option = option(
    "--weights",
    multiple=True,
    metavar="METRIC=PATH",
    help="A file or folder with the weights of a metric's network, instead of the hub's; again for more.",
)


def chosen_metrics(asked: Sequence[str], weights: Sequence[str]) -> tuple[list[Metric], dict[str, Path]]:
    """The default metrics and those that were asked for, each once, and by name the places of weights that were given.

    Raises RecipeError when a place is for no metric, for one that is not measured or that needs none, ArtifactError
    when a file is missing.
    """
    metrics = {name: catalog.metric(name) for name in (*catalog.DEFAULT, *asked)}
    places: dict[str, Path] = {}
    for text in weights:
        name, _, place = text.partition("=")
        if not place:
            raise RecipeError(f"--weights {text}: expected METRIC=PATH, such as fid=weights/inception.pth")
        files = catalog.metric(name).weights
        if files is None:
            raise RecipeError(f"--weights {text}: {name} looks through no network; leave this out")
        if name not in metrics:
            raise RecipeError(f"--weights {text}: {name} is not measured; add --metric {name}, or leave this out")
        if name in places:
            raise RecipeError(f"--weights {text}: {name} has weights already, {places[name]}; pass one of them")
        places[name] = Path(place)
        if not places[name].exists():
            raise ArtifactError(
                f"--weights {text}: no such file or folder; check the path, or get it with '{files.command}'"
            )
        files.paths(place)
    return list(metrics.values()), places
