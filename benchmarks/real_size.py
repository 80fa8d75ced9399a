"""The whole way of SD3-Medium or SD3.5-Medium at its real size on random weights: seconds, memory and bytes of every
stage.

    python benchmarks/sd3_real_size.py --work FOLDER
    python benchmarks/sd3_real_size.py --work FOLDER --size sd3.5-medium
    python benchmarks/sd3_real_size.py --work FOLDER --host diffusionkit

Writes a single file of a transformer of 2.085 or 2.470 B parameters and an autoencoder, calibrates, quantizes, saves,
loads and draws one picture, each in a process of its own whose peak resident memory is its own, too. Text encoders are
stubs at their real output shapes, the autoencoder is real. A run that was killed goes on where it was:
FOLDER/state.json has the finished stages, and calibration and sweep keep their own progress. ``--size tiny`` and
``--size tiny-3.5`` do the same in seconds. The last line on stdout is one JSON object.

The projection is for this machine, 512x512 pixels, 50 prompts and 28 steps, from what was measured:
- one row (a latent with one side of the guidance) through the transformer costs ``12 n d^2 + 2 n^2 d`` multiplications
  a block for n tokens (a quarter of the latent's pixels, and 333 of text, with DiffusionKit 589) of width d: Linears
  and attention; a second attention ``4 m d^2 + 2 m^2 d`` for the m tokens of the image;
- calibration runs prompts x steps rows on each side of the guidance, all of them;
- in the sweep statistics and comparisons scale with rows and their cost, of which there are as many (picture, step)
  pairs as the
  model's own limit has it; rounding the layers does not depend on either;
- decoding scales with pixels; loading and saving do not change.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx

from mlxquant.api import jobs
from mlxquant.api.model import Model, QuantizedModel
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import peak_bytes, progress, result, say
from mlxquant.files import checked
from mlxquant.files.atomic import atomic_file, ensure_writable
from mlxquant.models.catalog import adapter_class
from mlxquant.progress import Progress
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sampling.conditioning import Conditioning
from random_sd3 import SIZES, Sizes, write_folder

CLIP_TOKENS, TOKEN = 77, 4096
T5_TOKENS = {"native": 256, "diffusionkit": 512}  # by host
BY_ROWS = ("statistics", "states", "calibrated", "rtn")  # parts of a sweep that run rows through the model
INTERVAL = 1.0  # seconds between two notes of how long the running stage has taken
PROMPT = "a tabby cat on a table"


@dataclass(frozen=True)
class Job:
    """What a work folder is for."""

    work: str
    size: str
    pixels: int
    prompts: int
    steps: int
    recipe: str
    host: str

    @property
    def checkpoint(self) -> Path:
        return Path(self.work) / "checkpoint"

    @property
    def place(self) -> Path:
        """What the model is loaded from: DiffusionKit's host reads a folder."""
        return self.checkpoint if self.host == "diffusionkit" else self.checkpoint / SIZES[self.size].file

    @property
    def quantized(self) -> Path:
        return Path(self.work) / "quantized"

    def parts(self, stage: str) -> Parts:
        return Parts(Path(self.work) / f"{stage}.parts.json")


class StubText:
    """Text encoders without weights: noise for each prompt, in the shape and about the scale of the real ones."""

    def __init__(self, pooled: int, long: int):
        self._pooled, self._long = pooled, long

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """As our own host asks."""
        tokens, pooled = zip(*self.encode(prompts), strict=True)
        return Conditioning(tokens=mx.stack(list(tokens)), pooled=mx.stack(list(pooled)))

    def encode(self, prompts: Sequence[str]) -> list[tuple[mx.array, mx.array]]:
        """As DiffusionKit's: token embeddings [77 + long,4096], CLIP's padded with zeros, and pooled embedding [P],
        float32.
        """
        pairs = []
        for prompt in prompts:
            random = np.random.default_rng(zlib.crc32(prompt.encode()))
            tokens = np.zeros((CLIP_TOKENS + self._long, TOKEN), np.float32)
            tokens[:CLIP_TOKENS, : self._pooled] = random.standard_normal((CLIP_TOKENS, self._pooled), np.float32)
            tokens[CLIP_TOKENS:] = 0.2 * random.standard_normal((self._long, TOKEN), np.float32)
            pairs.append((mx.array(tokens), mx.array(random.standard_normal(self._pooled, np.float32))))
        return pairs


def stubbed(model: Model, job: Job) -> Model:
    """A model with stubs for text encoders and the checkpoint's VAE."""
    adapter: Any = model.adapter
    adapter.place = str(job.place)
    adapter.components.text = StubText(adapter.config.pooled_text_embed_dim, T5_TOKENS[job.host])
    return model


def full_precision(job: Job) -> Model:
    reference = f"diffusionkit:{job.place}" if job.host == "diffusionkit" else str(job.place)
    return stubbed(mq.load(reference, job.pixels), job)


class Parts:
    """Seconds of each kind of work in a stage, kept in a file so that a killed attempt is counted, too."""

    def __init__(self, path: Path):
        self._path, self._saved = path, time.monotonic()
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if time.monotonic() - self._saved > INTERVAL:
            with atomic_file(self._path) as temporary:
                temporary.write_text(checked.canonical(self.seconds), encoding="utf-8")
            self._saved = time.monotonic()

    def progress(self, rest: str) -> Progress:
        """Progress bars whose time is added under what their label says after the stage's name, or under ``rest``."""

        def run(items: Iterable[Any], label: str) -> Iterator[Any]:
            for item in progress(items, label):
                start = time.perf_counter()
                yield item
                self.add(label.partition(": ")[2] or rest, time.perf_counter() - start)

        return run


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(job: Job) -> dict[str, Any]:
    write_folder(job.checkpoint, SIZES[job.size], text=False)
    return {"bytes": size_of(job.checkpoint)}


def calibration(model: Model, job: Job, work: Path, bars: Progress) -> Calibration:
    prompts = model.adapter.prompts("calibration", job.prompts)
    return mq.calibrate(model, prompts, job.steps, progress=bars, work=work)


def calibrate(job: Job) -> dict[str, Any]:
    model, work, parts = full_precision(job), jobs.partial_folder(job.quantized), job.parts("calibrate")
    ensure_writable(work)
    calib = calibration(model, job, work, parts.progress("sampling"))
    return {"parts": parts.seconds, "pairs": calib.facts["samples"], "bytes": size_of(work)}


def quantize(job: Job) -> dict[str, Any]:
    parts = job.parts("quantize")
    with jobs.work_folder(job.quantized, force=True) as work:
        model = full_precision(job)
        calib = calibration(model, job, work, progress)
        done = jobs.quantized(model, calib, parse_recipe(job.recipe), work, parts.progress("states"))
        start = time.perf_counter()
        done.model.save(job.quantized, force=True)
        parts.add("save", time.perf_counter() - start)
    size = done.model.size
    return {
        "parts": parts.seconds,
        "bytes": size_of(job.quantized),
        "bits_per_weight": size.bits_per_weight,
        "bits_per_quantized_weight": size.bits_per_quantized_weight,
        "kept": dict(Counter(stage["kept"] for stage in done.model.facts["stages"])),
    }


def load(job: Job) -> dict[str, Any]:
    model = mq.load(job.quantized)
    assert isinstance(model, QuantizedModel)
    mx.eval(model.adapter.module.parameters())
    return {"layers": len(model.layers)}


def draw(job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    model = stubbed(mq.load(job.quantized), job)
    mx.eval(model.adapter.module.parameters())
    loaded = time.perf_counter()
    latent = model.adapter.generate([PROMPT], [7], job.steps)
    sampled = time.perf_counter()
    picture = model.adapter.decode(latent)[0]
    decoded = time.perf_counter()
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(Path(job.work) / "image.png")
    parts = {"load": loaded - start, "sampling": sampled - loaded, "decoding": decoded - sampled}
    return {"parts": parts, "finite": bool(np.isfinite(picture).all()), "std": float(picture.std())}


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "write": write,
    "calibrate": calibrate,
    "quantize": quantize,
    "load": load,
    "image": draw,
}


def exit_with_parent() -> None:
    """End this process as soon as the one that reads its results is gone, killed or not: nobody else may be working in
    the folder.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_stage(name: str, job: Job) -> None:
    """One stage in this process; its figures are the last line on stdout."""
    exit_with_parent()
    start = time.perf_counter()
    facts = STAGES[name](job)
    result({**facts, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()})


class State:
    """FOLDER/state.json: the job, the figures of its finished stages, and for how long the unfinished ones have run so
    far.
    """

    def __init__(self, job: Job):
        self._path, wanted = Path(job.work) / "state.json", checked.plain(asdict(job) | {"work": "."})
        self._data: dict[str, Any] = {"job": wanted, "stages": {}, "spent": {}}
        if self._path.exists():
            self._data = json.loads(self._path.read_text(encoding="utf-8"))
        if self._data["job"] != wanted:
            raise click.ClickException(
                f"{self._path} is of another run, {self._data['job']}; choose another --work or remove it"
            )

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self._data["stages"]

    def attempts(self, stage: str) -> list[float]:
        """Seconds of each attempt at a stage."""
        return list(self._data["spent"].get(stage, []))

    def save(self, **changes: dict[str, Any]) -> None:
        for key, change in changes.items():
            self._data[key] |= change
        with atomic_file(self._path) as temporary:
            temporary.write_text(checked.canonical(self._data), encoding="utf-8")


def finish(name: str, job: Job, state: State) -> dict[str, Any]:
    """Run a stage in a process of its own, noting how long it takes; exits when it fails."""
    before, start = state.attempts(name), time.perf_counter()
    options = [f"--{key}={value}" for key, value in asdict(job).items()]
    command = [sys.executable, str(Path(__file__).absolute()), *options, f"--stage={name}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while True:
        seconds = time.perf_counter() - start
        state.save(spent={name: [*before, seconds]})
        try:
            process.wait(INTERVAL)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.stdout is not None
    lines = process.stdout.read().decode().splitlines()
    if process.returncode:
        sys.exit(f"stage {name} ended with {process.returncode}; run the same command again to go on")
    attempts = [*before, time.perf_counter() - start]
    return {**json.loads(lines[-1]), "attempts": attempts, "process_seconds": sum(attempts)}


def row_cost(pixels: int, sizes: Sizes, host: str) -> float:
    """Multiplications of one row in the mean block."""
    hidden, image = sizes.hidden, (pixels // 16) ** 2
    tokens = image + CLIP_TOKENS + T5_TOKENS[host]
    second = (4.0 * image * hidden**2 + 2.0 * image**2 * hidden) * sizes.dual / sizes.depth
    return 12.0 * tokens * hidden**2 + 2.0 * tokens**2 * hidden + second


def projection(job: Job, stages: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds for 512x512, 50 prompts and 28 steps on this machine; see the module's docstring."""
    sizes, rows = SIZES[job.size], 50 * 28
    cost = row_cost(512, sizes, job.host) / row_cost(job.pixels, sizes, job.host)
    pairs = min(adapter_class("sd3-medium").samples, rows) / stages["calibrate"]["pairs"]
    sampling, image = stages["calibrate"]["parts"]["sampling"], stages["image"]["parts"]
    sweep = sum(stages["quantize"]["parts"].get(part, 0.0) for part in BY_ROWS)
    return {
        "calibrate": stages["calibrate"]["process_seconds"] + sampling * (rows / (job.prompts * job.steps) * cost - 1),
        "quantize": stages["quantize"]["process_seconds"] + sweep * (pairs * cost - 1),
        "image": (
            image["load"] + image["sampling"] * 28 / job.steps * cost + image["decoding"] * (512 / job.pixels) ** 2
        ),
    }


def table(stages: dict[str, dict[str, Any]]) -> str:
    rows = [f"{'stage':<12}{'seconds':>10}{'attempts':>10}{'peak GB':>10}{'disk GB':>10}  parts"]
    for name, facts in stages.items():
        disk = f"{facts['bytes'] / 1e9:.3f}" if "bytes" in facts else ""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in facts.get("parts", {}).items())
        figures = (
            f"{facts['process_seconds']:>10.1f}{len(facts['attempts']):>10}{facts['peak_bytes'] / 1e9:>10.2f}{disk:>10}"
        )
        rows.append(f"{name:<12}{figures}  {parts}")
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **checked.versions(),
    }


@click.command()
@click.option("--work", required=True, help="Folder for everything: 6.5 GB at the real size.")
@click.option("--size", type=click.Choice(list(SIZES)), default="sd3-medium", show_default=True)
@click.option("--pixels", default=256, show_default=True, type=click.IntRange(16), help="Of a picture's side.")
@click.option("--prompts", default=2, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=4, show_default=True, type=click.IntRange(1))
@click.option("--recipe", default="gptq-w4a8", show_default=True)
@click.option("--host", default="native", type=click.Choice(list(T5_TOKENS)), show_default=True)
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="This stage alone, in this process.")
def main(stage: str | None, **options: Any) -> None:
    """Write, calibrate, quantize, load and draw."""
    job = Job(**options)
    if job.host == "diffusionkit" and SIZES[job.size].norms:
        raise click.UsageError(f"DiffusionKit does not run {job.size}; leave --host out")
    if stage is not None:
        run_stage(stage, job)
        return
    Path(job.work).mkdir(parents=True, exist_ok=True)
    state = State(job)
    for name in STAGES:
        if name not in state.stages:
            state.save(stages={name: finish(name, job, state)})
    stages, projected = state.stages, projection(job, state.stages)
    seconds, peak = (
        sum(facts["process_seconds"] for facts in stages.values()),
        max(facts["peak_bytes"] for facts in stages.values()),
    )
    say(table(stages))
    say(
        f"{seconds / 60:.1f} minutes, at most {peak / 1e9:.2f} GB resident, {stages['quantize']['bits_per_weight']:.2f}"
        " bits per weight"
    )
    say(
        "projection for 512x512, 50 prompts, 28 steps here: "
        + ", ".join(f"{k} {v / 60:.0f} min" for k, v in projected.items())
    )
    report = {"job": asdict(job), "stages": stages, "seconds": seconds, "peak_bytes": peak, "machine": machine()}
    result({**report, "projection_512px_50_prompts_28_steps_seconds": projected})


if __name__ == "__main__":
    main()
