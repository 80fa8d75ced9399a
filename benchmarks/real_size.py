"""The whole way of a picture model at its real size on random weights: seconds, memory and bytes of every stage.

    python benchmarks/real_size.py --model pixart-alpha --work FOLDER

Writes a folder of the hub's layout (``random_folders``), loads it as a user's, calibrates, quantizes, saves, loads and
draws one picture, each in a process of its own whose peak resident memory is its own, too. Text encoders are stubs at
their real output shapes, the VAE is real. A run that was killed goes on where it was: FOLDER/state.json has the
finished stages, and calibration and sweep keep their own progress. ``--tiny`` does the same in seconds. Each stage is a
JSON object on stdout as it ends, and the last line is one about all of it.

``sd3-medium-diffusionkit`` runs on DiffusionKit's modules, from the files that it downloads (``random_sd3``).

``--torch`` also times diffusers' own forward pass on the same weights against ours (``against_torch``), where torch
and diffusers are installed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
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

from against_torch import compare
from mlxquant.api import jobs
from mlxquant.api.model import Model, QuantizedModel
from mlxquant.calibration.trajectories import Calibration
from mlxquant.commandline.console import peak_bytes, progress, result, say
from mlxquant.files import checked
from mlxquant.files.atomic import atomic_file, ensure_writable
from mlxquant.progress import Progress
from mlxquant.recipes.grammar import parse_recipe
from random_folders import MODELS, stub_text, write_model
from random_sd3 import SD3_MEDIUM, TINY, mmdit, parameters, write_folder

DIFFUSIONKIT = "sd3-medium-diffusionkit"
TOKENS, WIDTH = 77 + 512, 4096  # of the text that DiffusionKit's transformer reads
INTERVAL = 1.0  # seconds between two notes of how long the running stage has taken
PROMPT = "a tabby cat on a table"


@dataclass(frozen=True)
class Job:
    """What a work folder is for; ``pixels`` are of a picture's side."""

    work: str
    model: str
    tiny: bool
    pixels: int
    num_prompts: int
    steps: int
    recipe: str

    @property
    def checkpoint(self) -> Path:
        return Path(self.work) / "checkpoint"

    @property
    def quantized(self) -> Path:
        return Path(self.work) / "quantized"

    @property
    def reference(self) -> str:
        """What ``mq.load`` takes."""
        host = "diffusionkit:" if self.model == DIFFUSIONKIT else f"{self.model}@"
        return f"{host}{self.checkpoint}"

    def parts(self, stage: str) -> Parts:
        return Parts(Path(self.work) / f"{stage}.parts.json")


class StubText:
    """DiffusionKit's text encoders without weights, as ``random_folders.stub_text`` is for other hosts."""

    def __init__(self, pooled: int):
        shapes = {"joint_attention_dim": WIDTH, "pooled_projection_dim": pooled}
        self._encode = stub_text("sd3-medium", shapes)

    def encode(self, prompts: Sequence[str]) -> list[tuple[mx.array, mx.array]]:
        """Token embeddings [589,4096] and pooled embedding [P] of each prompt, float32."""
        found = self._encode(list(prompts))
        more = TOKENS - found["tokens"].shape[1]
        tokens = mx.concatenate([found["tokens"], found["tokens"][:, -more:]], axis=1)
        return list(zip(tokens, found["pooled"], strict=True))


def stubbed(model: Model, job: Job) -> Model:
    """A model with stubs for text encoders and the checkpoint's VAE."""
    adapter: Any = model.adapter
    adapter.place = str(job.checkpoint)
    if job.model == DIFFUSIONKIT:
        adapter.components.text = StubText(adapter.config.pooled_text_embed_dim)
    else:
        component, _ = MODELS[job.model].drawing
        said = json.loads((job.checkpoint / component / "config.json").read_text(encoding="utf-8"))
        adapter.components.text = stub_text(job.model, said)
    return model


def full_precision(job: Job) -> Model:
    return stubbed(mq.load(job.reference, job.pixels), job)


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
    if job.model == DIFFUSIONKIT:
        sizes = TINY if job.tiny else SD3_MEDIUM
        write_folder(job.checkpoint, sizes, text=False)
        count = parameters(mmdit(sizes))
    else:
        count = write_model(job.checkpoint, job.model, job.tiny)
    return {"bytes": size_of(job.checkpoint), "parameters": count}


def calibration(model: Model, job: Job, work: Path, bars: Progress) -> Calibration:
    prompts = model.adapter.prompts("calibration", job.num_prompts)
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


def load_exact(job: Job) -> dict[str, Any]:
    model = full_precision(job)
    mx.eval(model.adapter.module.parameters())
    return {"layers": len(model.adapter.layers())}


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


def forward(job: Job) -> dict[str, Any]:
    return compare(job.checkpoint, job.model, job.pixels)


TORCH = "torch"
STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "write": write,
    "load-exact": load_exact,
    "calibrate": calibrate,
    "quantize": quantize,
    "load": load,
    "image": draw,
    TORCH: forward,
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
    options = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(job).items() if key != "tiny"]
    options += ["--tiny"] if job.tiny else []
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
@click.option("--model", required=True, type=click.Choice([*MODELS, DIFFUSIONKIT]))
@click.option("--work", required=True, help="Folder for everything: 6.5 GB for sd3-medium.")
@click.option("--tiny", is_flag=True, help="Tiny configurations, in seconds.")
@click.option("--pixels", default=256, show_default=True, type=click.IntRange(16), help="Of a picture's side.")
@click.option("--num-prompts", default=2, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=4, show_default=True, type=click.IntRange(1))
@click.option("--recipe", default="gptq-w4a8", show_default=True)
@click.option("--torch", "torch", is_flag=True, help="Time diffusers' forward pass against ours, too.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="This stage alone, in this process.")
def main(stage: str | None, torch: bool, **options: Any) -> None:
    """Write, load, calibrate, quantize, load and draw."""
    job = Job(**options)
    if torch and job.model == DIFFUSIONKIT:
        raise click.UsageError("--torch is about the folders that diffusers reads; name sd3-medium")
    if stage is not None:
        run_stage(stage, job)
        return
    Path(job.work).mkdir(parents=True, exist_ok=True)
    state = State(job)
    for name in STAGES:
        if name not in state.stages and (torch or name != TORCH):
            state.save(stages={name: finish(name, job, state)})
            result({"stage": name, **state.stages[name]})
    stages = state.stages
    seconds, peak = (
        sum(facts["process_seconds"] for facts in stages.values()),
        max(facts["peak_bytes"] for facts in stages.values()),
    )
    say(table(stages))
    say(
        f"{seconds / 60:.1f} minutes, at most {peak / 1e9:.2f} GB resident, {stages['quantize']['bits_per_weight']:.2f}"
        " bits per weight"
    )
    result({"job": asdict(job), "stages": stages, "seconds": seconds, "peak_bytes": peak, "machine": machine()})


if __name__ == "__main__":
    main()
