"""``mlxquant compare-images``: the report for pictures that other tools drew, pair by pair."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click

from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import PATH, force_option, option, verbose_option
from .errors import ArtifactError
from .evaluation.contender import distinct
from .evaluation.figures import Judge, PictureSet, differences
from .evaluation.image_folders import paired, read_picture
from .evaluation.metric_options import chosen_metrics, metric_option, weights_option
from .evaluation.paired import blank, few
from .evaluation.report_folder import machine, say_report, summarise, write_report
from .files.atomic import atomic_folder, claimed
from .sampling.prompts import read_prompts


@click.command("compare-images", cls=Command)
@click.argument("reference", type=PATH)
@click.argument("others", type=PATH, nargs=-1, required=True)
@option(
    "--prompts",
    "prompt_file",
    type=PATH,
    help=(
        "What the pictures show, one seed<TAB>prompt a line in the order of their names; for metrics that look at the"
        " text."
    ),
)
@metric_option
@weights_option
@option("--out", type=PATH, required=True, help="Folder for the report.")
@force_option
@verbose_option
def command(
    reference: Path,
    others: tuple[Path, ...],
    prompt_file: Path | None,
    asked: tuple[str, ...],
    weights: tuple[str, ...],
    out: Path,
    force: bool,
) -> None:
    """Compare folders of pictures with a reference.

    Both are folders. Pictures are paired by name, cat.png with cat.jpg too; a pair is of one size. Writes report.html,
    report.json, report.csv and every picture.
    """
    start = time.perf_counter()
    metrics, places = chosen_metrics(asked, weights)
    folders = [reference, *others]
    names, files = paired(folders)
    prompts = None if prompt_file is None else read_prompts(prompt_file)
    if prompts is not None and len(prompts) != len(names):
        raise ArtifactError(
            f"{prompt_file} holds {len(prompts)} prompts for {len(names)} pictures; expected one for each, in name"
            " order"
        )
    texting = [metric.name for metric in metrics if metric.needs == "prompts"]
    if texting and prompts is None:
        raise ArtifactError(f"--metric {texting[0]} looks at the text of each picture; pass it with --prompts")
    during_command(claimed(out, force))
    judge = Judge(metrics, None if prompts is None else [prompt.text for prompt in prompts], places=places)
    labels = distinct(folder.absolute().name for folder in folders)
    pictures = [PictureSet(*own, partial(map, read_picture, paths)) for own, paths in zip(labels, files, strict=True)]
    facts = [
        {**blank(one.name, one.folder), **judge.score(one, pictures[0] if one is not pictures[0] else None, progress)}
        for one in pictures
    ]
    table = judge.table(accuracy=False)
    report = {
        "source": "folders",
        "settings": {"folders": [one.name for one in pictures]},
        "machine": machine(),
        "prompts": [
            {"index": index, "name": name, "text": None if prompts is None else prompts[index].text}
            for index, name in enumerate(names)
        ],
        "metrics": table,
        "reference": facts[0],
        "results": facts[1:],
        "noise_floor": None,
        "differences": differences(table, facts[0], facts[1:]),
        "trajectory_sigma": None,
        "measured": [],
        "notes": [*judge.notes, *few(len(names))],
        "methods": [],
    }
    with atomic_folder(out, force) as temporary:
        write_report(temporary, report, pictures, progress)
    say_report(report)
    say(f"{out / 'report.html'}")
    result({**summarise(report), "out": str(out), "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    command()
