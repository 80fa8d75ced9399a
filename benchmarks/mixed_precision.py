"""What mixed precision is worth: ``python benchmarks/mixed_precision.py --recipe gptq-w4a16 --bits-per-weight 5.5
--bits-per-weight 6``.

On ``mmdit-shapes`` and its held-out prompts: PSNR of the decoded picture against full precision at the same seed (mean
and bootstrap 95 % interval) and attribute accuracy, of uniform recipes and of the same recipes with their bits
allocated to each limit. ``predicted`` is the velocity error that the allocation expects. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import click

import mlxquant as mq
from mlxquant.commandline.console import progress, result, say
from mlxquant.sweep.allocation import allocate
from pictures import Pictures, machine, mean_psnr


@click.command()
@click.option("--recipe", "names", multiple=True, default=("gptq-w4a16",), show_default=True)
@click.option(
    "--bits-per-weight", "weights", multiple=True, type=float, help="Of quantized weights, with their scales."
)
@click.option(
    "--bits-per-activation", "inputs", type=float, help="With each of them: the average over inputs and noise levels."
)
@click.option("--num-prompts", default=32, show_default=True)
@click.option("--calibration-prompts", default=16, show_default=True)
def main(
    names: tuple[str, ...], weights: tuple[float, ...], inputs: float | None, num_prompts: int, calibration_prompts: int
) -> None:
    pictures = Pictures(num_prompts)
    model, calib = pictures.model, pictures.calibration(calibration_prompts)
    rows: dict[str, Any] = {}
    for name in names:
        for limit in (None, *weights):
            start, recipe, facts, row_name = time.perf_counter(), mq.parse_recipe(name), dict[str, Any](), name
            if limit is not None:
                mixed = allocate(model.adapter, calib, recipe, limit, inputs, progress=progress)
                recipe, facts, row_name = mixed.recipe, mixed.facts, f"{name} at {limit:g}"
            seconds = {"allocate": time.perf_counter() - start}
            quantized = mq.quantize(model, calib, recipe, progress=progress)
            seconds["quantize"] = time.perf_counter() - start - seconds["allocate"]
            decibels, accuracy = pictures.scores(quantized)
            tables = [layer.table.bits.mean() for layer in quantized.layers.values() if layer.table is not None]
            rows[row_name] = {
                **mean_psnr(decibels),
                "accuracy": accuracy["mean"],
                "bits_per_quantized_weight": quantized.size.bits_per_quantized_weight,
                "bits_per_weight": quantized.size.bits_per_weight,
                "activation_bits": float(sum(tables) / len(tables)) if tables else 16.0,
                "predicted": facts.get("error"),
                "predicted_uniform": facts.get("error_before"),
                "layers_by_bits": dict(
                    sorted(Counter(layer.format.bits for layer in quantized.layers.values()).items())
                ),
                "seconds": seconds,
            }
            row = rows[row_name]
            say(
                f"{row_name}: {row['psnr_db']:.2f} dB at {row['bits_per_quantized_weight']:.3f} bits, layers"
                f" {row['layers_by_bits']}"
            )
    result({"prompts": num_prompts, "calibration_prompts": calibration_prompts, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
