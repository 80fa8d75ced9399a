"""Kill every step of the explicit pipeline at a random moment, run it again, and compare all files with a run that
nobody killed.

    python benchmarks/kill_and_resume.py --seed 0

Each step is the real command in a process of its own, on mmdit-shapes. It runs once undisturbed, which says how long it
takes, and then, from the same files, it is sent SIGKILL at a random share of that time and run again to its end. Every
file must have the same bytes, and there must be no others. The last line on stdout is one JSON object; the exit code is
1 when anything differs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.commandline.console import progress, result, say
from mlxquant.files.checked import file_digest

ATTEMPTS = 20
PROMPT = "a large red circle at left on white background"


def commands(num_images: int, num_steps: int, iters: int) -> dict[str, list[str]]:
    """The six steps in order, with paths relative to the folder that they run in."""
    images, calib = ["--num-images", str(num_images)], ["--calib-dir", "calib"]
    sampling = ["--model", "mmdit-shapes", *images, "--num-steps", str(num_steps), "--cfg-weight", "2"]
    learning = ["--bits-w", "4", "--bits-a", "8", "--iters", str(iters)]
    loading = [
        "--adaround-output",
        "weights",
        "--quant-config",
        "calib/activations/quant_config.json",
        "--prompt",
        PROMPT,
    ]
    return {
        "generate_calibration_data": [*sampling, *calib],
        "cache_adaround_data": [*calib, *images, "--stride", "2"],
        "adaround_optimize": ["--cache-dir", "calib/adaround_cache", "--output-dir", "weights", *learning],
        "collect_layer_activations": [*calib, *images, "--stride", "2"],
        "analyze_activations": ["--stats", "calib/activations/layer_statistics.json", "--force"],
        "load_adaround_model": [
            *loading,
            "--output-image",
            "a.png",
            "--compare",
            "--diff-stats",
            "--save",
            "model",
            "--force",
        ],
    }


def start(step: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A step as a process that runs in ``folder``."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-m", f"mlxquant.{step}", *arguments],
        cwd=folder,
        env=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(step: str, arguments: list[str], folder: Path) -> float:
    """Run a step to its end; the seconds that it took. Exits when it fails."""
    began = time.perf_counter()
    process = start(step, arguments, folder)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{step} ended with {process.returncode} in {folder}:\n{errors.decode()}")
    return time.perf_counter() - began


def kill(
    step: str, arguments: list[str], before: Path, folder: Path, seconds: float, random: np.random.Generator
) -> float:
    """Run a step in a fresh copy of ``before`` and kill it; the seconds after which that was. Tries until the step was
    still running.
    """
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        delay = float(random.uniform(0.2, 1)) * seconds
        process = start(step, arguments, folder)
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if process.returncode == -signal.SIGKILL:
            return delay
    sys.exit(
        f"{step} was always faster than the kill, {ATTEMPTS} times; its {seconds:.1f} s were measured on a busier"
        " machine"
    )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@click.command()
@click.option("--num-images", default=4, show_default=True)
@click.option("--num-steps", default=8, show_default=True)
@click.option("--iters", default=60, show_default=True)
@click.option(
    "--only", type=click.Choice(list(commands(1, 1, 1))), help="Kill this step alone; those before it run undisturbed."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides on the moments.")
def main(num_images: int, num_steps: int, iters: int, only: str | None, seed: int) -> None:
    """Kill, resume, compare."""
    random, report = np.random.default_rng(seed), {}
    rows = [f"{'step':<28}{'seconds':>9}{'killed at':>11}{'done':>7}{'files':>7}  differences"]
    with tempfile.TemporaryDirectory() as name:
        before, whole, killed = (Path(name) / part for part in ("before", "whole", "killed"))
        whole.mkdir()
        for step, arguments in progress(commands(num_images, num_steps, iters).items(), "steps"):
            shutil.rmtree(before, ignore_errors=True)
            shutil.copytree(whole, before)
            seconds = finish(step, arguments, whole)
            if only not in (None, step):
                continue
            delay = kill(step, arguments, before, killed, seconds, random)
            done = len(digests(killed)) - len(digests(before))
            finish(step, arguments, killed)
            expected, found = digests(whole), digests(killed)
            different = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
            report[step] = {"seconds": seconds, "killed_at_s": delay, "files": len(found), "equal": not different}
            rows.append(
                f"{step:<28}{seconds:>9.2f}{delay:>11.2f}{done:>7}{len(found):>7}  {', '.join(different) or 'none'}"
            )
            if step == only:
                break
    say("\n".join(rows))
    equal = all(row["equal"] for row in report.values())
    result({"steps": report, "equal": equal})
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
