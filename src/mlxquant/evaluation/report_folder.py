"""The report as files: JSON for programs, CSV for spreadsheets, PNGs and a page for people."""

from __future__ import annotations

import csv
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..commandline.console import say
from ..files import checked
from ..files.atomic import atomic_file
from ..files.checked import write_json
from ..progress import Progress
from ..report.comparison import save_png, to_pil
from ..report.page import write_page
from .figures import PictureSet

KIND = "evaluation"
COSTS = (  # of a model: key, title, what is divided by, digits
    ("bits_per_weight", "bits/weight", 1, 2),
    ("model_bytes", "MB", 1e6, 2),
    ("latency_s", "s/step", 1, 4),
    ("peak_bytes", "peak MB", 1e6, 1),
    ("seconds_quantize", "quantize s", 1, 1),
)
LISTS = ("each", "attributes", "trajectory", "trajectory_interval")  # of a model, that are no single numbers


def machine() -> str:
    """What the figures were computed on."""
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    return (
        f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, mlx"
        f" {checked.versions()['mlx']}, {device}"
    )


def write_report(folder: Path, report: Mapping[str, Any], pictures: Sequence[PictureSet], progress: Progress) -> None:
    """Fill a folder, which may hold ``layers`` and ``models`` already. Raises ArtifactError where it cannot be
    written.
    """
    for some in progress(pictures, "writing pictures"):
        (folder / "images" / some.folder).mkdir(parents=True)
        for index, image in enumerate(some.each()):
            save_png(to_pil(image), folder / "images" / some.folder / f"{index:04d}.png")
    write_json(folder / "report.json", KIND, {**report, **checked.versions()})
    write_table(folder / "report.csv", [report["reference"], *report["results"]])
    write_page(folder)


def write_table(path: Path, models: Sequence[Mapping[str, Any]]) -> None:
    """One row a model: all of its single numbers, intervals as two columns, unknown ones empty."""
    rows = [_flat(model) for model in models]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in model.items():
        if key.endswith("_interval") and key not in LISTS:
            row[f"{key.removesuffix('_interval')}_low"], row[f"{key.removesuffix('_interval')}_high"] = value or (
                "",
                "",
            )
        elif key not in LISTS:
            row[key] = "" if value is None else value
    return row


def put(source: Path, target: Path) -> None:
    """Have a file or folder at ``target`` as well, without a second copy of its bytes where the disk can do that."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links: a copy is the same file, only larger
        shutil.copy2(source, target)


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as one line for programs: single numbers and intervals of the models."""
    rows = [
        {key: value for key, value in row.items() if key not in LISTS}
        for row in (report["reference"], *report["results"])
    ]
    return {"reference": rows[0], "results": rows[1:], "prompts": len(report["prompts"]), "notes": report["notes"]}


def say_report(report: Mapping[str, Any]) -> None:
    """The report as a table for people, with the intervals of what has one."""
    models = [report["reference"], *report["results"], *([report["noise_floor"]] if report["noise_floor"] else [])]
    costs = [column for column in COSTS if any(model[column[0]] is not None for model in models)]
    rows = [["model", *(metric["title"] for metric in report["metrics"]), *(title for _, title, _, _ in costs)]]
    for model in models:
        quality = [_quality(model[metric["key"]], model[f"{metric['key']}_interval"]) for metric in report["metrics"]]
        cost = ["" if model[key] is None else f"{model[key] / unit:.{digits}f}" for key, _, unit, digits in costs]
        rows.append([model["name"], *quality, *cost])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        say(
            "  ".join(
                [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
            )
        )
    for note in report["notes"]:
        say(note)


def _quality(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return ""
    digits = 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}" + (
        "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    )
