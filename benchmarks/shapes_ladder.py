"""How much each part of W4A8 costs on pictures: ``python benchmarks/shapes_ladder.py``.

On ``mmdit-shapes`` and its held-out prompts, PSNR of the decoded picture against full precision at the same seed (mean
and paired bootstrap 95 % interval) and attribute accuracy, for: weights alone (activations in full precision),
activations alone (weights in full precision), and both. ``-same-weights`` rows take a W4A8 model's weights without its
activation tables. Rows that are in ``WORK.jsonl`` (``--work WORK``) already are not computed again. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxquant.api.model import Model, QuantizedModel
from mlxquant.commandline.console import progress, result, say
from mlxquant.grids.reading import TableReader, represented
from mlxquant.layers.tree import set_module
from pictures import Pictures, machine, mean_psnr
from rows import Rows

ROWS = (
    [f"{method}-w{bits}a16" for bits in (4, 3, 2) for method in ("rtn", "gptq")]
    + [f"w16a{bits}{kind}" for bits in (8, 6, 4) for kind in ("", "-static")]
    + ["rtn-w4a8", "gptq-w4a8", "gptq-w4a8-same-weights"]
)


class QuantizedInput(nn.Module):
    """A full-precision Linear whose input is quantized by a table: activations alone."""

    def __init__(self, linear: nn.Linear, reader: TableReader):
        super().__init__()
        self._linear, self._reader = linear, reader

    def __call__(self, x: mx.array) -> mx.array:
        return self._linear(represented(x, self._reader.read(x)))


def activations_alone(model: Model, quantized: QuantizedModel) -> Model:
    """The full-precision model with the activation tables of a quantized one."""
    adapter = model.clone()
    linears = adapter.layers()
    for path, layer in quantized.layers.items():
        if layer.table is not None:
            set_module(adapter.module, path, QuantizedInput(linears[path], TableReader(layer.table, adapter.clock)))
    return Model(adapter)


def without_tables(quantized: QuantizedModel) -> Model:
    """The same weights with full-precision activations."""
    other = Model(quantized.clone())
    for layer in QuantizedModel(other.adapter, {}).layers.values():
        layer.drop_activations()
    return other


def build(name: str, model: Model, calib: mq.calibration.Calibration) -> Model:
    if name.startswith("w16"):
        return activations_alone(
            model, mq.quantize(model, calib, "rtn-" + name.replace("w16", "w8"), progress=progress)
        )
    recipe = name.removesuffix("-same-weights")
    quantized = mq.quantize(model, calib, recipe, progress=progress)
    return quantized if name == recipe else without_tables(quantized)


@click.command()
@click.option("--num-prompts", default=32, show_default=True)
@click.option("--calibration-prompts", default=16, show_default=True)
@click.option("--row", "names", multiple=True, help="Only these rows, such as gptq-w3a16; any recipe will do.")
@click.option("--work", type=click.Path(path_type=Path), help="Rows are kept in WORK.jsonl.")
def main(num_prompts: int, calibration_prompts: int, names: tuple[str, ...], work: Path | None) -> None:
    pictures = Pictures(num_prompts)
    calib = pictures.calibration(calibration_prompts)
    rows: dict[str, Any] = {"fp": {"accuracy": pictures.accuracy(pictures.reference)}}
    say(f"{'row':<26}{'PSNR dB':>9}{'95 %':>16}{'accuracy':>10}{'shape':>8}{'seconds':>9}")
    say(f"{'fp':<26}{'':>25}{rows['fp']['accuracy']['mean']:>10.1%}{rows['fp']['accuracy']['shape']:>8.1%}")

    def measure(name: str) -> dict[str, Any]:
        start = time.perf_counter()
        other = build(name, pictures.model, calib)
        seconds = time.perf_counter() - start
        decibels, accuracy = pictures.scores(other)
        return {
            **mean_psnr(decibels),
            "accuracy": accuracy,
            "seconds_quantize": seconds,
            "kept_rtn": [s["stage"] for s in getattr(other, "facts", {}).get("stages", []) if s["kept"] == "rtn"],
        }

    kept = None if work is None else Rows(work, **pictures.of, calibration_prompts=calibration_prompts)
    for name in names or ROWS:
        rows[name] = measure(name) if kept is None else kept.kept(name, partial(measure, name))
        row = rows[name]
        span = "{:.1f} to {:.1f}".format(*row["psnr_95"])
        accuracy = row["accuracy"]
        figures = (
            f"{row['psnr_db']:>9.2f}{span:>16}{accuracy['mean']:>10.1%}{accuracy['shape']:>8.1%}"
            f"{row['seconds_quantize']:>9.1f}"
        )
        say(f"{name:<26}{figures}")
    result({"prompts": num_prompts, "calibration_prompts": calibration_prompts, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
