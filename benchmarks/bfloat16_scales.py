"""What scales for bfloat16 cost, rounded after the codes and chosen before: ``python benchmarks/bfloat16_scales.py``.

``mmdit-shapes`` by each recipe three times: with the 11 digits of float16, with those scales and biases rounded to
bfloat16 when all is done (what writing such a model as bfloat16 does), and with ``-bf16`` in the recipe. Output errors
are of each layer by itself, on the full-precision model's inputs along its trajectories of held-out prompts: |y -
exact| / |exact|, a root mean square over noise levels. Computation is float32, so nothing else that a bfloat16 tool
rounds is in the figures. The last line of stdout is one JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS
from pictures import Pictures, machine, mean_psnr

# isort: split
import mlx.core as mx

from mlxquant.api.model import QuantizedModel
from mlxquant.commandline.console import progress, result, say
from mlxquant.evaluation.layer_report import Call, relative
from mlxquant.layers.names import BIASES, SCALES
from mlxquant.layers.tree import get_module, tapped

RECIPES = ("gptq-w4a16-g64", "gptq-w8a16-g64", "gptq-w4a16")
WAYS = ("11 digits", "rounded after", "8 digits before")
HELD_OUT, LEVELS = 2, 8


def rounded_after(model: QuantizedModel) -> None:
    """Scales and biases of a quantized model as bfloat16 holds them, in place; codes stay."""
    for layer in model.layers.values():
        for name in (SCALES, BIASES):
            if name in layer:
                layer[name] = layer[name].astype(mx.float32).astype(mx.bfloat16).astype(mx.float32)
        layer.refresh()


class LayerErrors:
    """Of a quantized model's layers, on inputs of the full-precision one."""

    def __init__(self, pictures: Pictures):
        adapter = pictures.model.adapter
        self._module = adapter.module
        latents = mq.calibrate(pictures.model, pictures.prompts[:HELD_OUT], progress=progress)
        sigmas, states = latents.batches(adapter)
        self._calls = list[Mapping[str, Call]]()
        for index in np.linspace(0, len(sigmas) - 1, LEVELS).astype(int):
            calls: dict[str, Call] = {}
            with adapter.clock.at(sigmas[index]), tapped(self._module, adapter.layers(), partial(_keep, calls)):
                state = states[index]
                for stage in adapter.stages:
                    state = stage.run(state)
                mx.eval(state, [list(call) for call in calls.values()])
            self._calls.append(calls)

    def of(self, model: QuantizedModel) -> np.ndarray:
        """By layer, in the order of the model's."""
        errors = [
            [
                float(relative(layer(*calls[path]), get_module(self._module, path)(*calls[path])))
                for calls in self._calls
            ]
            for path, layer in model.layers.items()
        ]
        return np.sqrt(np.square(errors).mean(1))


def _keep(calls: dict[str, Call], path: str, *call: Any) -> None:
    calls[path] = call


def by_bits(model: QuantizedModel, values: np.ndarray) -> dict[str, float]:
    """The geometric mean of a layer's value, by the bits of its weight."""
    bits = np.array([layer.format.bits for layer in model.layers.values()])
    return {str(each): round(float(np.exp(np.log(values[bits == each]).mean())), 3) for each in sorted(set(bits))}


@click.command(help=__doc__)
@click.option("--recipe", "recipes", multiple=True, default=RECIPES, show_default=True)
@click.option("--num-prompts", default=16, show_default=True)
@click.option("--calibration-prompts", default=16, show_default=True)
def main(recipes: tuple[str, ...], num_prompts: int, calibration_prompts: int) -> None:
    pictures = Pictures(num_prompts)
    layers, calib, rows = LayerErrors(pictures), pictures.calibration(calibration_prompts), list[dict[str, Any]]()
    for recipe in recipes:
        model = mq.quantize(pictures.model, calib, recipe, progress=progress)
        exact = layers.of(model)
        for way in WAYS:
            if way == WAYS[1]:
                rounded_after(model)
            elif way == WAYS[2]:
                model = mq.quantize(pictures.model, calib, f"{recipe}-bf16", progress=progress)
            errors = layers.of(model)
            decibels, _ = pictures.scores(model)
            rows.append(
                {
                    "recipe": recipe,
                    "scales": way,
                    "error": float(errors.mean()),
                    "worst_error": float(errors.max()),
                    "ratio": by_bits(model, errors / exact),
                    "worst_ratio": float((errors / exact).max()),
                    **mean_psnr(decibels),
                }
            )
            row = rows[-1]
            say(
                f"{recipe}, {way}: error of a layer {row['error']:.5f} (worst {row['worst_error']:.5f}),"
                f" {row['ratio']} of 11 digits' by bits (worst {row['worst_ratio']:.2f}), {row['psnr_db']:.2f} dB"
            )
    result({"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
