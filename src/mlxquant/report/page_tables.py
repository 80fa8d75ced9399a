"""The tables of the report page. Every number stands in a ``data-value`` as the report has it, and rounded for people
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .page_plots import INK, PAGE, colour

Json = Mapping[str, Any]
COLUMNS = {  # of every model, whatever was measured: title, what to divide by, decimals
    "model_bytes": ("MB", 1e6, 2),
    "bits_per_weight": ("bits / weight", 1, 2),
    "latency_s": ("ms / step", 1e-3, 1),
    "latency_ratio": ("time / reference", 1, 2),
    "peak_bytes": ("peak MB", 1e6, 1),
    "seconds_quantize": ("s to quantize", 1, 1),
}


def number(value: float | None, scale: float = 1, decimals: int | None = None) -> str:
    """A number with the value that it stands for; a dash where there is none."""
    if value is None:
        return "–"
    return f'<b data-value="{value!r}">{plain(value / scale, decimals)}</b>'


def decimals_of(metric: Json) -> int | None:
    """Decibels are read to two places."""
    return 2 if metric["unit"] == "dB" else None


def plain(value: float, decimals: int | None = None) -> str:
    """A number for people: by default two decimals from 10 on and four below; powers of ten where that would show
    nothing.
    """
    if decimals is None:
        decimals = 2 if abs(value) >= 10 else 4
    return f"{value:.2e}" if 0 < abs(value) < 10**-decimals else f"{value:.{decimals}f}"


def dot(tint: str) -> str:
    return f'<i class="dot" style="--c:{PAGE.get(tint, tint)}"></i>'


def legend(models: Sequence[tuple[str, str]]) -> str:
    """Names and colours."""
    return '<ul class="legend">' + "".join(f"<li>{dot(tint)}{escape(name)}</li>" for name, tint in models) + "</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Cells are HTML; ``kinds`` are the rows' classes."""
    texts = [bool(rows) and rows[0][column].startswith('<td class="text"') for column in range(len(head))]
    top = "".join(
        f'<th scope="col"{" class=text" if text else ""}>{cell}</th>' for cell, text in zip(head, texts, strict=True)
    )
    classes = [*kinds, *[""] * (len(rows) - len(kinds))]
    body = "".join(
        f'<tr class="{kind}">'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for row, kind in zip(rows, classes, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def summary(report: Json) -> str:
    """Models by metrics with intervals, then sizes and times."""
    metrics, results = report["metrics"], report["results"]
    reference, floor = report["reference"], report["noise_floor"]
    columns = {key: spec for key, spec in COLUMNS.items() if any(m.get(key) is not None for m in [reference, *results])}
    head = ["model", *(_title(metric) for metric in metrics), *(title for title, _, _ in columns.values())]
    best = {metric["key"]: _best(results, metric) for metric in metrics}
    rows, kinds = [], []
    for model, kind in [(reference, "reference"), *((m, "") for m in results), *([(floor, "")] if floor else [])]:
        tint = INK if model is reference or model is floor else colour(results.index(model))
        role = {id(reference): "reference", id(floor): "the reference in 16-bit arithmetic: the noise floor"}.get(
            id(model), ""
        )
        cells = [f"{dot(tint)}{escape(model['name'])}" + (f'<span class="sub">{role}</span>' if role else "")]
        cells += [_metric_cell(model, metric, best[metric["key"]] if model in results else None) for metric in metrics]
        cells += [_plain_cell(model, key, scale, decimals) for key, (_, scale, decimals) in columns.items()]
        rows.append(cells)
        kinds.append(kind)
    count = len(report["prompts"])
    hint = f"Means over {count} picture{'s' if count > 1 else ''} with paired bootstrap 95 % intervals. "
    hint += "The best of each column is green. " if any(value is not None for value in best.values()) else ""
    if measured := [columns[key][0] for key in report["measured"] if key in columns]:
        hint += f"{', '.join(measured)}: measured on {escape(report['machine'])}, and never twice the same."
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return (
        table(head, rows, kinds)
        + f'<p class="hint">{hint}</p>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + differences(report)
    )


def _title(metric: Json) -> str:
    arrow = "↑" if metric["higher_is_better"] else "↓"
    return escape(f"{metric['title']}{', ' + metric['unit'] if metric['unit'] else ''} {arrow}")


def _best(results: Sequence[Json], metric: Json) -> float | None:
    values = [model[metric["key"]] for model in results if model[metric["key"]] is not None]
    return None if len(set(values)) < 2 else max(values) if metric["higher_is_better"] else min(values)


def _metric_cell(model: Json, metric: Json, best: float | None) -> str:
    value, interval = model[metric["key"]], model.get(f"{metric['key']}_interval")
    kind = ' class="best"' if best is not None and value == best else ""
    samples = model.get(f"{metric['key']}_samples")
    below = [_span(interval, decimals_of(metric))] if interval else []
    below += [f"{samples} pictures"] if samples and value is not None else []
    return (
        f"<td{kind}>{number(value, decimals=decimals_of(metric))}"
        + "".join(f'<span class="sub">{text}</span>' for text in below)
        + "</td>"
    )


def _span(interval: Sequence[float], decimals: int | None) -> str:
    low, high = (f'<span data-value="{edge!r}">{plain(edge, decimals)}</span>' for edge in interval)
    return f"{low} to {high}"


def _plain_cell(model: Json, key: str, scale: float, decimals: int) -> str:
    cell = number(model.get(key), scale, decimals)
    if key == "latency_s" and model.get("latency_p95_s") is not None:
        tail = model["latency_p95_s"]
        cell += f'<span class="sub">95 %: <span data-value="{tail!r}">{plain(tail / scale, 1)}</span></span>'
    if key == "bits_per_weight" and model.get("bits_per_quantized_weight") is not None:
        own = model["bits_per_quantized_weight"]
        cell += f'<span class="sub"><span data-value="{own!r}">{plain(own, 2)}</span> where quantized</span>'
    return cell


def differences(report: Json) -> str:
    """Paired differences, and whether their intervals leave out zero."""
    if not report["differences"]:
        return ""
    metrics = {metric["key"]: metric for metric in report["metrics"]}
    rows = []
    for found in report["differences"]:
        metric, mean, interval = metrics[found["metric"]], found["mean"], found["interval"]
        places = decimals_of(metric)
        better = (mean > 0) == metric["higher_is_better"]
        unclear = interval is None or interval[0] <= 0 <= interval[1]
        verdict = "no different, as far as this shows" if unclear else "better" if better else "worse"
        pair = f"{escape(found['a'])} against {escape(found['b'])}"
        rows.append(
            [
                pair,
                escape(metric["title"]),
                number(mean, decimals=places),
                _span(interval, places) if interval else "–",
                verdict,
            ]
        )
    head = ["models", "metric", "mean difference", "95 % interval", "the first is"]
    return f"<h3>Paired differences</h3>{table(head, rows)}"


def decisions(report: Json, layers: Mapping[str, Json]) -> str:
    """What was kept in each stage of each model, and the errors that decided it."""
    parts: list[str] = []
    for place, model in enumerate(report["results"]):
        if model["name"] not in layers:
            continue
        stages = layers[model["name"]]["decisions"]
        tried = list(dict.fromkeys(name for stage in stages for name in _errors(stage)))
        rows = [
            [
                escape(stage["stage"]),
                f'<td class="text"><b>{escape(stage["kept"])}</b></td>',
                *(number(_errors(stage).get(name)) for name in tried),
                f'<td class="text">{escape(_why(stage))}</td>',
            ]
            for stage in stages
        ]
        head = ["stage", "kept", *(f"error, {escape(name)}" for name in tried), "remarks"]
        formats = _formats(layers[model["name"]]["layers"])
        name = f"{dot(colour(place))}{escape(model['name'])}"
        opened = "" if parts else " open"
        tuned = _tuned(layers[model["name"]].get("tuning"))
        parts.append(
            f"<details{opened}><summary>{name}</summary>{table(head, rows)}{tuned}<h3>Formats</h3>{formats}</details>"
        )
    if not parts:
        return '<p class="hint">No stages: none of these was quantized by mlxquant, or nothing is known of how.</p>'
    hint = (
        "Error: squared error of what the stage writes, weights hard-rounded, on calibration data; relative to what it"
        " should write, or, for recipes that weigh errors by their sensitivity, as the squared velocity error that it"
        " causes."
    )
    return f'<p class="hint">{hint}</p>' + "".join(parts)


def _tuned(facts: Json | None) -> str:
    """What became of scales that were tuned at the end; nothing where none were."""
    if not facts:
        return ""
    before, after = facts["loss_before"], facts["loss_after"]
    kept = "tuned scales were kept" if facts["kept"] else "tuned scales were not kept"
    told = f"{kept}: held-out loss {before:.3g} before, {after:.3g} after {facts['iterations']} iterations"
    return f"<p>{escape(told)} on {facts['numbers']} numbers.</p>"


def _errors(stage: Json) -> Json:
    """The error of everything that was tried; nothing where a stage was kept as it is."""
    return stage.get("errors") or {}


def _why(stage: Json) -> str:
    """In words: how much better the choice was, how learning went, which transforms were tried."""
    errors, parts = _errors(stage), []
    others = [error for name, error in errors.items() if name != stage["kept"]]
    if stage["kept"] in errors and others and errors[stage["kept"]] > 0:
        parts.append(f"{min(others) / errors[stage['kept']]:.2f} times less error than the next")
    if learning := stage.get("learning"):
        parts += [
            f"{share:.1%} of the codes flipped" for share in [learning.get("flipped")] if isinstance(share, float)
        ]
        parts += [f"{learning['iterations']} steps" for _ in [0] if "iterations" in learning]
    parts += [_tried(name, facts) for name, facts in stage.get("transforms", {}).items()]
    return "; ".join(parts)


def _tried(name: str, facts: Json) -> str:
    """What became of a transform in a stage."""
    count = len(facts["tensors"])
    if not count:
        return f"{name} helps no input"
    if "failed" in facts:
        return f"{name} failed: {facts['failed']}"
    inputs = f"{count} input{'s' if count > 1 else ''}"
    return f"{name} on {inputs}" if facts["kept"] else f"{name} tried on {inputs}, not kept"


def _formats(layers: Sequence[Json]) -> str:
    """How many layers of each role have which weights and inputs."""
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for layer in layers:
        bits = layer["activation"]
        groups.setdefault(
            (layer["role"], layer["weight"], "as they are" if bits == 16 else f"{bits:.3g} bits"), []
        ).append(layer)
    rows = []
    for (role, weight, inputs), some in groups.items():
        weights = [layer["shape"][0] * layer["shape"][1] for layer in some]
        stored = sum(layer["bits_per_weight"] * n for layer, n in zip(some, weights, strict=True)) / sum(weights)
        rows.append(
            [
                escape(role),
                escape(weight),
                escape(inputs),
                str(len(some)),
                f"{sum(weights) / 1e6:.3f} M",
                f"{stored:.2f}",
            ]
        )
    return table(["role", "weights", "inputs", "layers", "parameters", "bits / weight"], rows)


def methods(report: Json) -> str:
    """What was used, and whom to cite for it."""
    if not report["methods"]:
        return '<p class="hint">None by name: round to nearest, or pictures of other tools.</p>'
    parts = []
    for method in report["methods"]:
        entry = method.get("bibtex")
        cite = f"<details><summary>BibTeX</summary><pre>{escape(entry)}</pre></details>" if entry else ""
        parts.append(f"<p><b>{escape(method['name'])}</b>: {escape(method['source'])}</p>{cite}")
    return "".join(parts)


def details(report: Json) -> str:
    """Settings, machine, versions and what each metric is."""
    rows = [("mlxquant", report["mlxquant"]), ("MLX", report["mlx"]), ("machine", report["machine"])]
    rows += [(key.replace("_", " "), _text(value)) for key, value in report["settings"].items() if value is not None]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    metrics = "".join(
        f"<dt>{escape(m['title'])}</dt><dd>{escape(' '.join(filter(None, (m['network'], m['source']))) or '–')}</dd>"
        for m in report["metrics"]
    )
    return f"<dl>{facts}</dl><h3>Metrics</h3><dl>{metrics}</dl>"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
