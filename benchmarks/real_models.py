"""What quantization costs a model that others trained: ``python benchmarks/real_models.py --work WORK``.

The UNet of Adaptive Terrain Diffusion draws height maps from noise and a difficulty, in one step; ``examples/terrain``
says whose it is, and ``pip install 'mlxquant[onnx]'`` brings its weights. It is recorded while it draws 16 maps for
calibration, quantized by ``quantize_module``, and draws 32 others, at difficulties from 1 to 100. A row has the PSNR of
each against full precision at the same seed, whose own height is the peak, and stored bits a weight of the whole model.
What has quantized weights alone draws in ONNX Runtime, from the package's file with these weights in it: that is six
times as fast on a CPU, and owes nothing to our code. What quantizes inputs, too, draws in MLX.

What is reported is separate from what was chosen: figures are of seeds from 100 on, which no choice has seen;
``--choose`` takes those from 0 on. Every recipe is calibrated three times, each time on other seeds and difficulties;
intervals are over draws of the calibration and maps together, and differences are paired (``draws.py``).

Rows that are in ``WORK.jsonl`` already are not computed again, so several processes may share it; those behind the docs
are in ``benchmarks/results/real_models.jsonl``. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import platform
import sys
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

import recipe_tables
from mlxquant.commandline.console import progress, result, say
from mlxquant.files.checked import file_digest
from recipe_tables import Figures, bits, by_recipe, compared, format_of, gain, quality
from rows import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from terrain.heights import drawn, metres
from terrain.network import Denoiser
from terrain.weights import installed_file, pretrained, write

COUNT, FIRST = 32, 100  # maps, and the seed of the first that is reported
CALIBRATION, CALIBRATED = 16, 10_000  # maps a draw, and the seed of the first
DRAWS = 3
EXACT = "full precision"
ROWS = {
    "w8a16": "rtn gptq+unclipped",
    "w6a16": "rtn gptq+unclipped",
    "w4a16": "rtn gptq gptq+unclipped gptq+centred+unclipped qronos+unclipped mixed+unclipped",
    "w3a16": "rtn gptq+unclipped qronos+unclipped mixed+unclipped",
    "w4a8": "rtn gptq+unclipped mixed+unclipped",
}
MEANS = ("bits_per_weight", "share_quantized", "seconds_quantize")
TITLES = ("bits a weight", "PSNR dB (95 %)", "against rtn (95 %)", "quantized")


def rows() -> list[str]:
    """What is measured, format by format."""
    return [f"{method}-{form}" for form, methods in ROWS.items() for method in methods.split()]


def difficulties(count: int) -> list[int]:
    """From 1 to 100, evenly."""
    return [int(value) for value in np.rint(np.linspace(1, 100, count))]


def heights(model: Denoiser | InOnnxRuntime, seeds: range) -> np.ndarray:
    """Height maps [len(seeds),128,128] in metres, each at another difficulty."""
    asked = list(zip(seeds, difficulties(len(seeds)), strict=True))
    return np.stack([metres(drawn(model, *one)) for one in progress(asked, "drawing")])


def psnr(maps: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """In dB of each map [maps]; the peak is the height of the exact one."""
    error = ((maps.astype(np.float64) - exact) ** 2).mean((1, 2))
    return 20 * np.log10(np.ptp(exact, (1, 2))) - 10 * np.log10(error)


class InOnnxRuntime:
    """What a model computes, by ONNX Runtime on one thread.

    Args:
        file: The package's, or one that ``terrain.weights.write`` wrote.
    """

    def __init__(self, file: Path):
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, noisy: mx.array, sigma: mx.array, difficulty: mx.array) -> mx.array:
        given = {"noisy": noisy.transpose(0, 3, 1, 2), "sigma": sigma, "difficulty": difficulty}
        (clean,) = self.session.run(None, {name: np.array(value) for name, value in given.items()})
        return mx.array(clean).transpose(0, 2, 3, 1)


class Bench:
    """The exact maps, and the rows of every draw.

    Args:
        work: What ``--work`` says.
        first: The seed of the first map.
        count: How many maps.
    """

    def __init__(self, work: Path, first: int = FIRST, count: int = COUNT):
        self.seeds = range(first, first + count)
        self.work = work
        self.of = {"model": file_digest(installed_file())[:8], "seeds": f"{first}-{first + count - 1}"}

    def kept(self, draw: int) -> Rows:
        return Rows(self.work, **self.of, draw=draw)

    @cached_property
    def exact(self) -> np.ndarray:
        """The maps in full precision, drawn once and kept beside the rows."""
        file = self.kept(0).folder() / "exact.npy"
        if not file.exists():
            np.save(file, heights(InOnnxRuntime(installed_file()), self.seeds))
        return np.load(file)

    def measure(self, name: str, draw: int) -> dict[str, Any]:
        """A recipe, calibrated on one draw."""
        model, random = pretrained(), np.random.default_rng(draw)
        with mq.recording(model.network) as seen:
            for number in range(CALIBRATION):
                drawn(model, CALIBRATED + draw * CALIBRATION + number, int(random.integers(1, 101)))
        start = time.process_time()
        report = mq.quantize_module(model.network, seen, name, progress=progress)
        seconds = time.process_time() - start
        sizes = report.sizes
        return {
            "psnr_each": psnr(heights(self.drawing(model, name), self.seeds), self.exact).tolist(),
            "bits_per_weight": 8 * sizes.after / sizes.weights,
            "share_quantized": report.share.parameters,
            "seconds_quantize": seconds,
            "weighed": report.weighed,
            "kept": [stage["kept"] for stage in report.stages],
        }

    def drawing(self, model: Denoiser, name: str) -> Denoiser | InOnnxRuntime:
        """The model, or what computes the same faster."""
        specs = [spec for _, spec in mq.parse_recipe(name).rules if spec is not None]
        if any(spec.activation or spec.transforms or spec.branch for spec in specs):
            return model
        file = self.kept(0).folder() / f"{name}.onnx"
        write(model, file)
        try:
            return InOnnxRuntime(file)
        finally:
            file.unlink()


def measured(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a file by recipe, one a draw; ClickException where they are of several models or seeds, or none."""
    return by_recipe(file, "seeds")


def summaries(found: dict[str, list[dict[str, Any]]]) -> dict[str, Figures]:
    return {name: compared(rows, found.get(f"rtn-{format_of(name)}"), MEANS) for name, rows in found.items()}


def tables(figures: dict[str, Figures]) -> str:
    """Of all recipes, a table a format."""
    return recipe_tables.tables(figures, ROWS, TITLES, line)


def line(name: str, figures: Figures) -> str:
    against = "" if name.startswith("rtn-") or "gain_db" not in figures else gain(figures)
    once = "¹" if figures["draws"] == 1 else ""
    share = f"{figures['share_quantized']:.1%}"
    return f"| `{name}`{once} | {bits(figures):.2f} | {quality(figures)} | {against} | {share} |"


@click.command(help=__doc__)
@click.option("--row", "names", multiple=True, help="Only these, such as qronos-w3a16; any recipe will do.")
@click.option("--draws", "count", type=click.IntRange(1), default=DRAWS, show_default=True)
@click.option("--maps", type=click.IntRange(2), default=COUNT, show_default=True)
@click.option("--choose", is_flag=True, help="Measure on seeds from 0 on, which choices are made on.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(names: tuple[str, ...], count: int, maps: int, choose: bool, table: bool, work: Path) -> None:
    bench = Bench(work, 0 if choose else FIRST, maps)
    if not table:
        for draw in range(count):
            for name in names or rows():
                bench.kept(draw).kept(name, partial(bench.measure, name, draw))
    found = measured(bench.kept(0).file)
    figures = summaries(found)
    say(tables({name: row for name, row in figures.items() if not names or name in names}))
    result({"platform": platform.platform(), "rows": figures})


if __name__ == "__main__":
    main()
