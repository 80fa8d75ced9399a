"""Diffusers' own forward pass against ours on the same weights: float32, two threads, interleaved.

Each runs in a process of its own that waits while the other works, so that neither's threads disturb the other's. Both
get the same latents, text and time; how far their predictions are apart is told, too.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx

from mlxquant.commandline.console import peak_bytes
from random_folders import MODELS, stub_text

THREADS, RUNS, ROWS = 2, 5, 2  # both sides of guidance are two rows
LEVEL, PROMPTS = 0.6, ["a tabby cat on a table", ""]
Prediction = npt.NDArray[np.float32]


def inputs(folder: Path, name: str, pixels: int) -> dict[str, Prediction]:
    """Latent [2,H,W,C], time [2], and the conditioning."""
    component, _ = MODELS[name].drawing
    config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    side = pixels // 8
    latent = np.random.default_rng(0).standard_normal((ROWS, side, side, config["in_channels"])).astype(np.float32)
    text = stub_text(name, config)(PROMPTS)
    return {"latent": latent, **{key: np.array(text[key]) for key in text.keys()}}  # noqa: SIM118


def ours(folder: Path, name: str, pixels: int, times: list[float]) -> Callable[[], Prediction]:
    """Our prediction of two rows."""
    adapter: Any = mq.load(f"{name}@{folder}", pixels).adapter
    adapter.module.set_dtype(mx.float32)
    mx.eval(adapter.module.parameters())
    given = {key: mx.array(value) for key, value in inputs(folder, name, pixels).items()}
    state = given | {"t": mx.array(times)}

    def run() -> Prediction:
        (predicted,) = adapter.run(dict(state), LEVEL).values()
        return np.array(predicted)

    return run


def theirs(folder: Path, name: str, pixels: int, times: list[float]) -> Callable[[], Prediction]:
    """Diffusers' prediction of two rows."""
    import diffusers
    import torch

    torch.set_num_threads(THREADS)
    component, kind = MODELS[name].drawing
    module = getattr(diffusers, kind).from_pretrained(folder / component, torch_dtype=torch.float32).eval()
    given = {key: torch.tensor(value) for key, value in inputs(folder, name, pixels).items()}
    latent, t = given["latent"].permute(0, 3, 1, 2).contiguous(), torch.tensor(times)
    asked = {
        "transformer": {"encoder_hidden_states": given.get("tokens")},
        "unet": {"encoder_hidden_states": given.get("text")},
    }[component]
    if "mask" in given:
        asked |= {"encoder_attention_mask": given["mask"].long(), "added_cond_kwargs": sizes_told(module, pixels)}
    if "pooled" in given:
        asked["pooled_projections"] = given["pooled"]

    def run() -> Prediction:
        with torch.no_grad():
            (predicted,) = module(latent, timestep=t, **asked, return_dict=False)
        return predicted.permute(0, 2, 3, 1).numpy()

    return run


def sizes_told(module: Any, pixels: int) -> dict[str, Any]:
    """What a PixArt for 1024 pixels is told of a picture."""
    import torch

    if not module.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    return {"resolution": torch.full((ROWS, 2), float(pixels)), "aspect_ratio": torch.ones(ROWS, 1)}


SIDES = {"ours": ours, "theirs": theirs}


class Worker:
    """One side in a process of its own; it works when it is asked to."""

    def __init__(self, side: str, folder: Path, name: str, pixels: int, times: list[float]):
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
        command = [
            sys.executable,
            str(Path(__file__).absolute()),
            side,
            str(folder),
            name,
            str(pixels),
            *map(str, times),
        ]
        environment = {**os.environ, **threads}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, what: str) -> Any:
        """ "run" gives seconds, "peak" bytes, "prediction" an array."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n".encode())
        self._process.stdin.flush()
        said = self._process.stdout.read(int(self._process.stdout.readline() or 0))
        if not said:
            raise click.ClickException("a side of the comparison ended; its error is above")
        return np.load(io.BytesIO(said), allow_pickle=False) if what == "prediction" else json.loads(said)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def compare(folder: Path, name: str, pixels: int) -> dict[str, Any]:
    """Seconds of each run of both sides by turns, the ratio of their medians, peaks, and the relative difference of
    what they predict.
    """
    adapter: Any = mq.load(f"{name}@{folder}", pixels).adapter
    times = [float(time) for time in np.broadcast_to(adapter.scheduler.time(LEVEL), (ROWS,))]
    del adapter
    workers = {side: Worker(side, folder, name, pixels, times) for side in SIDES}
    try:
        for worker in workers.values():
            worker.ask("run")  # loads weights, compiles
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(RUNS):
            for side, worker in workers.items():
                seconds[side].append(worker.ask("run"))
        found, wanted = (workers[side].ask("prediction") for side in ("ours", "theirs"))
        peaks = {side: worker.ask("peak") for side, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    medians = {side: float(np.median(values)) for side, values in seconds.items()}
    return {
        "seconds_each": seconds,
        "medians": medians,
        "ratio": medians["ours"] / medians["theirs"],
        "peaks": peaks,
        "relative_difference": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
        "threads": THREADS,
    }


def main(side: str, folder: str, name: str, pixels: str, *times: str) -> None:
    """A worker: a line in, a line with a length and so many bytes out."""
    run, last = SIDES[side](Path(folder), name, int(pixels), [float(time) for time in times]), np.zeros(0, np.float32)
    for line in sys.stdin:
        out = io.BytesIO()
        if line.strip() == "run":
            start = time.perf_counter()
            last = run()
            out.write(json.dumps(time.perf_counter() - start).encode())
        elif line.strip() == "peak":
            out.write(json.dumps(peak_bytes()).encode())
        else:
            np.save(out, last)
        sys.stdout.buffer.write(f"{out.tell()}\n".encode() + out.getvalue())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
