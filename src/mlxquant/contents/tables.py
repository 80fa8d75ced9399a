"""Contents as rows for people: one row a layer or array, or one for all that differ only by the numbers in
their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..pipeline.activation_stats import ActivationStats
from ..pipeline.quant_config import QuantConfig
from .arrays import StoredArray
from .layers import StoredLayer, activation_text
from .reader import Contents

Row = dict[str, Any]
SEVERAL = 3  # different texts in a cell before they are only counted
NUMBER = re.compile(r"(?<![A-Za-z])\d+|(?<=\bmm)\d+")  # of a block, step or picture; not the 1 of fc1


def layer_rows(contents: Contents) -> list[Row]:
    """What is known of each layer: of its weight, of its inputs, or of what was decided for them."""
    if contents.statistics is not None:
        return _of_statistics(contents.statistics)
    if contents.config is not None:
        return _of_config(contents.config)
    if contents.report is not None:
        return [_of_report(layer) for layer in contents.report]
    return [_of_layer(layer) for layer in contents.layers]


def array_rows(arrays: Sequence[StoredArray]) -> list[Row]:
    return [{"array": a.name, "shape": list(a.shape), "dtype": a.dtype, "bytes": a.nbytes} for a in arrays]


def _of_layer(layer: StoredLayer) -> Row:
    row = {
        "layer": layer.path,
        "shape": list(layer.shape),
        "weight": str(layer.format),
        "input": activation_text(layer),
        "bits/weight": layer.bits_per_weight,
    }
    row |= {} if layer.error is None else {"error": layer.error}
    return {**row, "besides": layer.extras} if layer.extras else row


def _of_statistics(stats: ActivationStats) -> list[Row]:
    rows = []
    for path in stats.leaders:
        seen = stats.ranges(path)
        peak = np.maximum(np.abs(seen.least), np.abs(seen.most)).max(1)  # by timestep
        row = {
            "layer": path,
            "readers": sum(stats.leader(other) == path for other in stats.layers),
            "width": seen.least.shape[1],
            "after": stats.after(path) or "-",
            "smallest": float(seen.least.min()),
            "largest": float(seen.most.max()),
            "peak max/min over time": float(peak.max() / max(peak.min(), 1e-30)),
        }
        rows.append(row)
    return rows


def _of_config(config: QuantConfig) -> list[Row]:
    rows = []
    for path, table in config.plain.items():
        facts = config.layers[path]
        row = {"layer": path, "mean bits": float(table.bits.mean())}
        row |= {f"A{bits}": int((table.bits == bits).sum()) for bits in (4, 6, 8, 16)}
        row |= {"smallest step": float(table.step.min()), "largest step": float(table.step.max())}
        row |= {"shifted": "yes" if facts["shifted"] else "-", "output error": facts["relative_error"]}
        rows.append(row)
    return rows


def _of_report(layer: Mapping[str, Any]) -> Row:
    """A layer of an evaluation's report; its error is the mean over noise levels, None where it has none of its own."""
    row = {name: layer[name] for name in ("stage", "role", "shape", "weight")}
    error = None if layer["error"] is None else float(np.mean(layer["error"]))
    return {
        "layer": layer["path"],
        **row,
        "mean input bits": layer["activation"],
        "bits/weight": layer["bits_per_weight"],
        "output error": error,
    }


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Rows whose first entries differ only by the numbers in them become one, with a count and with what they span."""
    if not rows:
        return []
    name = next(iter(rows[0]))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        texts = tuple(str(value) for value in row.values() if isinstance(value, str | list))[1:]
        groups.setdefault((NUMBER.sub("*", row[name]), *texts), []).append(row)
    return [
        {
            name: key[0] if len(some) > 1 else some[0][name],
            "count": len(some),
            **{k: _span(some, k) for k in some[0] if k != name},
        }
        for key, some in groups.items()
    ]


def _span(rows: Sequence[Row], column: str) -> str:
    texts = list(dict.fromkeys(cell(row.get(column), column) for row in rows))
    values = [row[column] for row in rows if isinstance(row.get(column), int | float)]
    if len(texts) == 1:
        return texts[0]
    if len(values) == len(rows):
        return f"{cell(min(values), column)} to {cell(max(values), column)}"
    return ", ".join(texts) if len(texts) <= SEVERAL else f"{len(texts)} kinds"


def cell(value: Any, column: str = "") -> str:
    """A value as a table shows it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "x".join(map(str, value)) or "scalar"
    if column == "bytes" and isinstance(value, int):
        return size(value)
    if column in ("bits/weight", "mean bits"):
        return f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def size(count: int) -> str:
    """A number of bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def lines(rows: Sequence[Row]) -> list[str]:
    """A table with its header, columns as wide as they have to be: the first to the left, numbers to the right."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [columns, *([cell(row.get(column), column) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    return [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in texts
    ]


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """One line a fact, cut to what fits one."""
    texts = {name: brief(value) for name, value in facts.items()}
    width = max((len(name) for name in texts), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in texts.items() if text]


def brief(value: Any) -> str:
    """A fact in a few words: digests shortened, recipes and models by their names, long lists and tables by
    their size.
    """
    if isinstance(value, Mapping):
        return str(value["name"]) if "name" in value else _brief_table(value)
    if isinstance(value, list):
        text = ", ".join(brief(inner) for inner in value)
        return text if len(text) <= 80 else f"{len(value)} entries"
    if isinstance(value, str):
        digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
        return f"{value[:12]}…" if digest else value
    return "" if value is None else cell(value)


def _brief_table(value: Mapping[str, Any]) -> str:
    """Entries that are texts by how often each is there, where one is there often; else all entries, or those that are
    short.
    """
    counts = Counter(inner for inner in value.values() if isinstance(inner, str))
    if len(value) > SEVERAL and counts.total() == len(value) and len(counts) <= SEVERAL:
        return ", ".join(f"{count} x {text}" for text, count in counts.most_common())
    for some in (value, {key: inner for key, inner in value.items() if not isinstance(inner, list | Mapping)}):
        text = ", ".join(f"{key} {brief(inner)}" for key, inner in some.items())
        if 0 < len(text) <= 140:
            return text
    return f"{len(value)} entries"
