"""Which inputs a UNet cannot do without in 8 bits: ``python benchmarks/unet_inputs.py``.

A tiny Stable Diffusion 1.5 with random weights (``random_folders``) is quantized by recipes that leave the inputs of
other layers exact. Told is the signal-to-noise ratio of its predictions in dB at each calibrated noise level, for one
side of guidance, the prompts', and for what guidance makes of both. Layers' patterns are those of ``--override``;
``conv_shortcut`` has a careful role, which "everything" takes away. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

import mlxquant as mq  # before mlx
from mlxquant.api.model import Model
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import result, say
from mlxquant.recipes.grammar import parse_recipe
from random_folders import stub_text, write_model

NAME, PIXELS, GUIDANCE = "sd15", 64, 7.5
SHORTCUTS, SAMPLERS = "*.conv_shortcut", "*samplers.*"
CASES = [  # what is told of it, the recipe, overrides
    ("rtn-w8a16", "rtn-w8a16", ()),
    ("rtn-w8a8, everything", "rtn-w8a8", (f"{SHORTCUTS}=w8a8",)),
    ("inputs of all resnets exact", "rtn-w8a8", ("*.resnets.*=w8a16",)),
    ("inputs of all attentions exact", "rtn-w8a8", (f"{SHORTCUTS}=w8a8", "*.attentions.*=w8a16")),
    ("inputs of conv1 exact (norm, SiLU)", "rtn-w8a8", (f"{SHORTCUTS}=w8a8", "*.conv1=w8a16")),
    ("inputs of conv2 exact (norm, SiLU)", "rtn-w8a8", (f"{SHORTCUTS}=w8a8", "*.conv2=w8a16")),
    ("inputs of conv_shortcut exact: rtn-w8a8 as it is", "rtn-w8a8", ()),
    ("inputs of down- and upsamplers exact", "rtn-w8a8", (f"{SHORTCUTS}=w8a8", f"{SAMPLERS}=w8a16")),
    ("of shortcuts and samplers exact", "rtn-w8a8", (f"{SAMPLERS}=w8a16",)),
    ("rtn-w8a8-token, everything", "rtn-w8a8-token", (f"{SHORTCUTS}=w8a8-token",)),
    ("gptq-w4a16, everything", "gptq-w4a16", (f"{SHORTCUTS}=w4a16",)),
    ("gptq-w4a8, everything", "gptq-w4a8", (f"{SHORTCUTS}=w4a8",)),
    ("conv_shortcut w8a16: gptq-w4a8 as it is", "gptq-w4a8", ()),
    ("conv_shortcut and samplers w8a16", "gptq-w4a8", (f"{SAMPLERS}=w8a16",)),
    ("conv_shortcut and samplers w4a16", "gptq-w4a8", (f"{SHORTCUTS}=w4a16", f"{SAMPLERS}=w4a16")),
]
Sides = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Predictions = list[Sides]


def load(folder: Path) -> Model:
    """The tiny model, with a stub for its text encoder."""
    write_model(folder, NAME, tiny=True)
    model = mq.load(f"{NAME}@{folder}", PIXELS)
    adapter: Any = model.adapter
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    adapter.components.text = stub_text(NAME, config)
    return model


def predictions(adapter: Any, calibration: Calibration) -> Predictions:
    """With the prompts and without, at each noise level."""
    texts = [prompt.text for prompt in calibration.prompts]
    sides = adapter.encode(texts), adapter.unconditional(len(texts))
    found = Predictions()
    for latent, level in zip(calibration.latents, calibration.sigmas, strict=True):
        prompted, empty = (np.array(adapter.velocity(latent, side, float(level))) for side in sides)
        found.append((prompted, empty))
    return found


def decibels(wanted: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


def ratios(wanted: Predictions, found: Predictions) -> dict[str, list[float]]:
    """Of the prompts' side, and of both when they are guided."""

    def guided(sides: Sides) -> npt.NDArray[np.float32]:
        return sides[1] + GUIDANCE * (sides[0] - sides[1])

    pairs = list(zip(wanted, found, strict=True))
    return {
        "one_side": [decibels(w[0], f[0]) for w, f in pairs],
        "guided": [decibels(guided(w), guided(f)) for w, f in pairs],
    }


@click.command(help=(__doc__ or "").partition(":")[0])
@click.option("--prompts", default=4, show_default=True, help="Calibration prompts.")
@click.option("--steps", default=4, show_default=True, help="Noise levels.")
def command(prompts: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = load(Path(folder))
        calibration = mq.calibrate(model, prompts, steps=steps)
        wanted = predictions(model.adapter, calibration)
        table = {}
        for told, recipe, overrides in CASES:
            quantized = mq.quantize(model, calibration, parse_recipe(recipe, overrides))
            table[told] = ratios(wanted, predictions(quantized.adapter, calibration))
            one, both = (" ".join(f"{value:.1f}" for value in values) for values in table[told].values())
            say(f"{told:50s} one side {one}   guided {both}")
    result({"guidance": GUIDANCE, "snr_db": table})


if __name__ == "__main__":
    command()
