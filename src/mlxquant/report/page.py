"""The report that people look at: one HTML file with everything in it, made from an evaluation's folder.

It loads nothing from anywhere, which its own content policy enforces, and works from a disk without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..files import schema
from ..files.atomic import atomic_file
from ..files.checked import read_json, understood
from ..sampling.picture_size import told
from ..sweep.store import STAGES
from . import page_layers, page_pictures, page_plots, page_tables

Json = Mapping[str, Any]
KIND, LAYERS_KIND = "evaluation", "layer-report"
REPORT = schema.entries(
    {
        "reference": schema.entries({"folder": schema.inside}),
        "results": schema.array_of(schema.entries({"name": schema.text, "folder": schema.inside})),
    }
)
TUNING = schema.entries(  # what became of tuned scales, see ``tuning.tune``
    {
        "kept": schema.flag,
        **dict.fromkeys(("loss_before", "loss_after"), schema.number(0)),
        **dict.fromkeys(("iterations", "numbers"), schema.whole()),
    }
)
LAYERS = schema.entries(  # an evaluation's report on the layers of a model
    {
        "layers": schema.array_of(
            schema.entries(
                {
                    **dict.fromkeys(("path", "role", "stage", "weight"), schema.text),
                    **dict.fromkeys(("activation", "bits_per_weight"), schema.number(0)),
                    "shape": schema.shape,
                    "error": schema.maybe(schema.array_of(schema.number(), 1)),
                    "codes": schema.entries({"first": schema.whole(-(2**8)), "count": schema.array_of(schema.whole())}),
                }
            )
        ),
        "decisions": STAGES,
    },
    {"tuning": TUNING},
)
SIZE_METRICS = 4  # quality over size for so many metrics


def write_page(folder: Path) -> Path:
    """Write ``report.html`` from ``report.json``, ``layers/`` and ``images/`` of the folder; equal folders give equal
    bytes.

    Raises ArtifactError when one of these is missing, damaged, or of another version.
    """
    report = read_json(folder / "report.json", KIND, REPORT)
    with understood(folder / "report.json", "run the evaluation again"):
        layers = {
            model["name"]: read_json(folder / "layers" / f"{model['folder']}.json", LAYERS_KIND, LAYERS)
            for model in report["results"]
            if model["quantized"]
        }
        html = render(
            report, layers, page_pictures.embed(folder, [report["reference"], *report["results"]], report["prompts"])
        )
    page = folder / "report.html"
    with atomic_file(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def render(report: Json, layers: Mapping[str, Json], pictures: page_pictures.Pictures) -> str:
    """The page's text; ``layers`` by the names of the quantized models."""
    models = [report["reference"], *report["results"]]
    own = files(__package__)
    return Template((own / "page.html").read_text("utf-8")).substitute(
        title=escape(title(report)),
        lead=escape(lead(report)),
        style=(own / "page.css").read_text("utf-8"),
        script=(own / "page.js").read_text("utf-8"),
        summary=page_tables.summary(report),
        size=quality_size(report),
        pictures=page_pictures.limits(report, pictures)
        + page_pictures.viewer(models, pictures)
        + page_pictures.grid(report, models, pictures),
        trajectory=trajectory(report),
        layers=page_layers.section(report, layers),
        decisions=page_tables.decisions(report, layers),
        methods=page_tables.methods(report),
        details=page_tables.details(report),
        data=json.dumps(viewer_data(report, models, pictures.shown), ensure_ascii=False, allow_nan=False).replace(
            "<", "\\u003c"
        ),
    )


def title(report: Json) -> str:
    model = report["settings"].get("model")
    return f"{model}, quantized" if model else "Pictures compared"


def lead(report: Json) -> str:
    """What was compared with what, in a line."""
    names = ", ".join(model["name"] for model in report["results"])
    settings = report["settings"]
    text = f"{names} against {report['reference']['name']} on {len(report['prompts'])} pictures"
    if "steps" in settings:
        text += (
            f" of {told(settings['size'])} pixels, {settings['steps']} steps, guidance {settings['cfg_weight']:g}"
            + (f" away from {settings['negative_prompt']!r}" if "negative_prompt" in settings else "")
            + ", the same prompts and seeds"
        )
    return text + "."


def quality_size(report: Json) -> str:
    """A plot for each metric that has values, of models that have a size."""
    panels: list[str] = []
    for metric in report["metrics"]:
        points = _points(report, metric)
        if len(points) < 2 or len(panels) == SIZE_METRICS:
            continue
        label = f"{metric['title']}{', ' + metric['unit'] if metric['unit'] else ''}"
        drawn = page_plots.quality_size(points, label, metric["higher_is_better"], f"size-{metric['key']}")
        arrow = "higher" if metric["higher_is_better"] else "lower"
        panels.append(
            f"<figure><figcaption><b>{escape(metric['title'])}</b> {arrow} is better</figcaption>{drawn}</figure>"
        )
    if not panels:
        return '<p class="hint">Nothing to plot: it takes two models whose sizes are known.</p>'
    hint = "Filled: no other is both smaller and better (the Pareto front, dashed). Bars: 95 % intervals."
    names = page_tables.legend(
        [(f"{number} {model['name']}", tint) for number, (model, tint) in enumerate(_tinted(report))]
    )
    return f'{names}<p class="hint">{hint}</p><div class="panels wide">{"".join(panels)}</div>'


def _points(report: Json, metric: Json) -> list[dict[str, Any]]:
    """The models, and the reference where the metric judges it, too."""
    return [
        {
            "number": number,
            "megabytes": model["model_bytes"] / 1e6,
            "value": model[metric["key"]],
            "interval": model.get(f"{metric['key']}_interval"),
            "colour": tint,
        }
        for number, (model, tint) in enumerate(_tinted(report))
        if model["model_bytes"] is not None and model[metric["key"]] is not None
    ]


def _tinted(report: Json) -> list[tuple[Json, str]]:
    """The reference and the models with their colours."""
    return [
        (report["reference"], page_plots.INK),
        *((m, page_plots.colour(i)) for i, m in enumerate(report["results"])),
    ]


def trajectory(report: Json) -> str:
    """Where in the denoising path each model departs."""
    results = [(place, m) for place, m in enumerate(report["results"]) if m.get("trajectory")]
    if not results or not report.get("trajectory_sigma"):
        return '<p class="hint">Not known: these pictures came without the path that led to them.</p>'
    curves = [
        {
            "label": m["name"],
            "colour": page_plots.colour(place),
            "error": m["trajectory"],
            "interval": m.get("trajectory_interval"),
        }
        for place, m in results
    ]
    floor = report["noise_floor"]
    if floor and floor.get("trajectory"):
        curves.append(
            {"label": floor["name"], "colour": page_plots.PALE, "error": floor["trajectory"], "interval": None}
        )
    names = page_tables.legend([(curve["label"], curve["colour"]) for curve in curves])
    last = [[escape(curve["label"]), page_tables.number(curve["error"][-1])] for curve in curves]
    caption = "Relative RMS difference from the reference's latent, mean over prompts; bands are 95 % intervals."
    drawn = page_plots.trajectories(report["trajectory_sigma"], curves, "trajectory-plot")
    ends = page_tables.table(["model", "error of the result"], last)
    return f'{names}<div class="panels wide"><figure><figcaption>{caption}</figcaption>{drawn}</figure>{ends}</div>'


def viewer_data(report: Json, models: Sequence[Json], shown: Sequence[int]) -> dict[str, Any]:
    """What the script needs: names, prompts and each picture's figures as text."""
    metrics = [metric for metric in report["metrics"] if metric["per_image"]]
    return {
        "models": [{"name": model["name"]} for model in models],
        "prompts": [{"text": page_pictures.said(report["prompts"][index])} for index in shown],
        "metrics": [
            {
                "title": m["title"],
                "text": [[page_pictures.figure(model, m, index) for index in shown] for model in models],
            }
            for m in metrics
        ],
    }
