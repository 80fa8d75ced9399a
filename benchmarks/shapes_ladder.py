"""How much each part of W4A8 costs on pictures: ``python benchmarks/shapes_ladder.py``.

On ``mmdit-shapes`` and its held-out prompts, PSNR of the decoded picture against full precision at the same seed (mean
and paired bootstrap 95 % interval) and attribute accuracy, for: weights alone (activations in full precision),
activations alone (weights in full precision), and both. ``-same-weights`` rows take a W4A8 model's weights without its
activation tables. Rows that are in ``--work`` already are not computed again. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import click

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlxquant.api.model import Model, QuantizedModel
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import progress, result, say
from mlxquant.files.atomic import atomic_file
from mlxquant.files.checked import canonical
from mlxquant.grids.reading import TableReader, represented
from mlxquant.layers.tree import set_module
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.psnr import psnr

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
    linears = adapter.linears()
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


def build(name: str, model: Model, calib: Calibration) -> Model:
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
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps finished rows.")
def main(num_prompts: int, calibration_prompts: int, names: tuple[str, ...], work: Path | None) -> None:
    model = mq.load("mmdit-shapes")
    prompts = model.adapter.prompts("evaluation", num_prompts)
    texts = [p.text for p in prompts]
    calib = mq.calibrate(model, calibration_prompts, progress=progress)
    reference = model.images(prompts, progress=progress)
    rows: dict[str, Any] = {"fp": {"accuracy": model.adapter.attributes(reference, texts)}}
    say(f"{'row':<26}{'PSNR dB':>9}{'95 %':>16}{'accuracy':>10}{'shape':>8}{'seconds':>9}")
    say(f"{'fp':<26}{'':>25}{rows['fp']['accuracy']['mean']:>10.1%}{rows['fp']['accuracy']['shape']:>8.1%}")
    for name in names or ROWS:
        kept = (
            work / f"{name}-{num_prompts}-{calibration_prompts}-{model.adapter.fingerprint[:8]}.json"
            if work is not None
            else None
        )
        if kept is not None and kept.exists():
            rows[name] = json.loads(kept.read_text())
        else:
            start = time.perf_counter()
            other = build(name, model, calib)
            seconds = time.perf_counter() - start
            images = other.images(prompts, progress=progress)
            decibels = psnr(images, reference)
            rows[name] = {
                "psnr_db": float(decibels.mean()),
                "psnr_95": interval(decibels),
                "accuracy": model.adapter.attributes(images, texts),
                "seconds_quantize": seconds,
                "kept_rtn": [s["stage"] for s in getattr(other, "facts", {}).get("stages", []) if s["kept"] == "rtn"],
            }
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(kept) as temporary:
                    temporary.write_text(canonical(rows[name]))
        row = rows[name]
        span = "{:.1f} to {:.1f}".format(*row["psnr_95"])
        accuracy = row["accuracy"]
        figures = (
            f"{row['psnr_db']:>9.2f}{span:>16}{accuracy['mean']:>10.1%}{accuracy['shape']:>8.1%}"
            f"{row['seconds_quantize']:>9.1f}"
        )
        say(f"{name:<26}{figures}")
    machine = f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, mlx {mx.__version__}"
    result({"prompts": num_prompts, "calibration_prompts": calibration_prompts, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
