"""mflux's own ``-q`` against our recipes, at the same bytes on the same calls: ``python benchmarks/mflux_peers.py
--weights WEIGHTS --work WORK``.

``--model shapes`` is the small Z-Image that ``train_z_image_shapes.py`` trained, which draws; ``random`` the same with
random weights; ``flux`` one block of each kind of FLUX.1 at its real width, with random weights. Each contender is
written as a folder and loaded by mflux. Weights are bfloat16 before they are quantized, as on the hub, and products
are float32.

Velocity: error of what the transformer returns on the calls of the full-precision model that draws held-out prompts;
guided: of what the sampler makes of it. Latents: error after 4, 20 and 50 steps from the same noise. All are the root
of the squared difference over the square. Flat: the standard deviation, in 255ths, of what should be plain background.
Rows are kept in ``WORK.jsonl``. The last line of stdout is one JSON object. Needs mflux:
``pip install --no-deps mflux==0.24.0``.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_contenders import Loaded, load, quantized_folder, write
from mflux_subjects import FluxPair, Shapes, Subject, deviation, flat, levels, obeyed
from mlxquant.commandline.console import progress, result, say
from mlxquant.files import checked
from mlxquant.layers.tree import parameters
from mlxquant.metrics.psnr import psnr
from rows import Rows

EXACT, OWN = "full precision", "mflux -q "
TEXT = ",context_refiner.*=w8a16-g64,cap_embedder.*=w8a16-g64"  # which mixed precision leaves alone, at 8 bits
LEAST = ",@modulation=w{0}a16-g64,@embedder=w{0}a16-g64,@output=w{0}a16-g64"
RECIPES = [
    *(f"gptq-w{bits}a16-g64" + LEAST.format(bits) for bits in (3, 4, 5, 6)),
    *(f"gptq+mixed{bits + 0.5:g}-w{bits}a16-g64" + LEAST.format(bits) for bits in (3, 4, 5, 6)),
    "gptq+mixed4.5-w4a16-g64" + TEXT + LEAST.format(4),
    "gptq-w3a16-g64",
    "gptq-w4a16-g64",
    "mixed-w4a16-g64",
]
CONTENDERS = [EXACT, *(f"{OWN}{bits}" for bits in (3, 4, 5, 6, 8)), *RECIPES]
STEPS = (4, 20, 50)
CALIBRATED, COMPARED = 8, 20  # steps of drawings that are recorded, and of those whose calls are compared

Steps = list[tuple[list[dict[str, Any]], list[mx.array]]]  # of a drawing: the calls of each, and what they returned


class Bench:
    """A model, its prompts, and what it does in full precision.

    Args:
        subject: The model.
        folder: For its weights in bfloat16.
        calibration: How many prompts are recorded.
        prompts: How many held-out prompts.
        steps: After how many steps latents are compared.
    """

    def __init__(self, subject: Subject, folder: Path, calibration: int, prompts: int, steps: Sequence[int]):
        self.subject, self.folder, self.steps = subject, folder, tuple(steps)
        write(subject.filled(), folder)
        exact = self.loaded(None).module  # not kept, for FLUX's has 2 GB
        self.weights = sum(value.size for value in parameters(exact).values())
        self.calibration = subject.prompts("calibration", calibration)
        self.prompts = subject.prompts("evaluation", prompts)
        self.seen: list[Steps] = []
        for prompt in progress(self.prompts, "full precision"):
            self.seen.append([])
            draw(subject, exact, prompt, COMPARED, self.seen[-1])
        self.latents = {steps: self.drawn(exact, steps) for steps in self.steps}

    def loaded(self, bits: int | None) -> Loaded:
        """The full-precision weights as mflux loads them, with ``-q BITS`` or without."""
        return load(self.folder, self.subject.blank(), self.subject.definition, bits)

    def drawn(self, module: nn.Module, steps: int) -> list[mx.array]:
        """What a transformer draws of the held-out prompts."""
        return [draw(self.subject, module, prompt, steps) for prompt in progress(self.prompts, f"{steps} steps")]

    def measure(self, name: str) -> dict[str, Any]:
        """The row of a contender."""
        start, facts = time.process_time(), dict[str, Any]()
        if name == EXACT:
            contender = self.loaded(None)
        elif name.startswith(OWN):
            contender = self.loaded(int(name.removeprefix(OWN)))
        else:
            module = self.loaded(None).module
            with mq.recording(module) as seen:
                for prompt in progress(self.calibration, "record"):
                    draw(self.subject, module, prompt, CALIBRATED)
            with quantized_folder(module, seen, name) as (folder, facts):
                contender = load(folder, self.subject.blank(), self.subject.definition)
        seconds = time.process_time() - start
        return {**facts, "cpu_seconds": seconds, **self.figures(contender, name == EXACT)}

    def figures(self, contender: Loaded, exact: bool) -> dict[str, Any]:
        """What is compared; the PSNR of pictures that are ``exact`` is no number."""
        figures: dict[str, Any] = {
            "bytes": contender.nbytes,
            "bits_per_weight": 8 * contender.nbytes / self.weights,
            "layers": contender.layers,
            "velocity_each": [],
            "guided_each": [],
        }
        for steps in progress(self.seen, "velocity"):
            wanted = [wrote for _, wrote in steps]
            found = [[contender.module(**call) for call in calls] for calls, _ in steps]
            figures["velocity_each"].append(error(list(chain(*found)), list(chain(*wanted))))
            taken = [[self.subject.velocity(wrote) for wrote in one] for one in (found, wanted)]
            figures["guided_each"].append(error(*taken))
        for count in self.steps:
            latents = self.drawn(contender.module, count)
            full = self.latents[count]
            pairs = zip(latents, full, strict=True)
            figures[f"latents_{count}_each"] = [error([one], [other]) for one, other in pairs]
            if isinstance(self.subject, Shapes) and self.subject.draws:
                pictures, others = self.subject.pictures(latents), self.subject.pictures(full)
                captions = [prompt.text for prompt in self.prompts]
                figures[f"flat_{count}_each"] = deviation(pictures, [flat(caption) for caption in captions])
                figures[f"obeyed_{count}"] = obeyed(pictures, captions)
                if not exact:
                    figures[f"psnr_{count}_each"] = psnr(np.clip(pictures, 0, 1), np.clip(others, 0, 1)).tolist()
        return figures


def draw(subject: Subject, module: nn.Module, prompt: mq.Prompt, steps: int, kept: Steps | None = None) -> mx.array:
    """Latents after all steps of Euler's method; ``kept`` gets its steps."""
    latents, sigmas = subject.noise(prompt), levels(steps)
    for step in range(steps):
        calls = subject.calls(prompt, latents, step, steps)
        wrote = [module(**call) for call in calls]
        latents = latents + (sigmas[step + 1] - sigmas[step]) * subject.velocity(wrote)
        mx.eval(latents, wrote)
        if kept is not None:
            kept.append((calls, wrote))
    return latents


def error(found: Sequence[mx.array], wanted: Sequence[mx.array]) -> float:
    """The root of the squared difference over the square."""
    noise = sum(float(mx.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
    return float(np.sqrt(noise / sum(float(mx.square(b).sum()) for b in wanted)))


def fingerprint(module: nn.Module) -> str:
    """Of its weights."""
    whole = hashlib.sha256()
    for _, value in sorted(parameters(module).items()):
        whole.update(np.array(value.astype(mx.float32)).tobytes())
    return whole.hexdigest()[:8]


def root_mean(values: Sequence[float]) -> float:
    """Of errors of prompts: the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def table(rows: dict[str, dict[str, Any]], steps: Sequence[int]) -> str:
    """Rows by bytes, in Markdown."""
    drawn = any("flat" in key for row in rows.values() for key in row)
    titles = ["contender", "kB", "bits", "velocity %", "guided %", *(f"latents {count}, %" for count in steps)]
    titles += [f"PSNR {steps[-1]}, dB", *(f"flat {count}" for count in steps), f"obeyed {steps[-1]}"] if drawn else []
    lines = [titles, ["---"] * len(titles)]
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["bytes"], item[0])):
        cells = [f"`{name}`", f"{row['bytes'] / 1e3:.0f}", f"{row['bits_per_weight']:.2f}"]
        cells += [f"{100 * root_mean(row[key]):.2f}" for key in ("velocity_each", "guided_each")]
        cells += [f"{100 * root_mean(row[f'latents_{count}_each']):.2f}" for count in steps]
        if drawn:
            decibels = row.get(f"psnr_{steps[-1]}_each")
            cells.append(f"{np.mean(decibels):.2f}" if decibels else "")
            cells += [f"{root_mean(row[f'flat_{count}_each']):.2f}" for count in steps]
            cells.append(f"{row[f'obeyed_{steps[-1]}']:.1%}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@click.command(help=__doc__)
@click.option("--model", "name", type=click.Choice(["shapes", "random", "flux"]), default="shapes", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Of the trained Z-Image.")
@click.option("--row", "names", multiple=True, help="Only these, such as 'mflux -q 4'; any recipe will do.")
@click.option("--num-prompts", "prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--calibration-prompts", "calibration", type=click.IntRange(1), default=16, show_default=True)
@click.option("--steps", multiple=True, type=click.IntRange(1), default=STEPS, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(
    name: str,
    weights: Path | None,
    names: tuple[str, ...],
    prompts: int,
    calibration: int,
    steps: tuple[int, ...],
    work: Path,
) -> None:
    if (name == "shapes") != (weights is not None):
        raise click.ClickException("--model shapes needs --weights, and no other has any; see train_z_image_shapes.py")
    subject: Subject = FluxPair() if name == "flux" else Shapes(weights)
    of = {"model": name, "weights": fingerprint(subject.filled()), "prompts": prompts, "calibration": calibration}
    kept = Rows(work, **of, steps=list(steps))
    wanted = [one for one in names or CONTENDERS if one not in kept.figures()]
    if wanted:
        with TemporaryDirectory() as folder:
            bench = Bench(subject, Path(folder), calibration, prompts, steps)
            for one in wanted:
                kept.keep(one, bench.measure(one))
                say(f"{one}: velocity {100 * root_mean(kept.figures()[one]['velocity_each']):.2f} %")
    rows = kept.figures()
    say(table(rows, steps))
    facts = {"benchmark": "mflux_peers", **of, "steps": steps, "machine": platform.platform()}
    result({**facts, "mflux": version("mflux"), **checked.versions(), "rows": rows})


if __name__ == "__main__":
    main()
