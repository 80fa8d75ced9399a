"""What this machine has: memory, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

WIDTH, SECONDS = 1024, 0.25  # of the matrices that are multiplied, and for how long
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container on Linux


def memory_bytes() -> int:
    """Memory that this process can have: the machine's, or less where a container says so."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else ""
    return min(installed, int(limit)) if limit.isdigit() else installed


def forward_rate(dtype: mx.Dtype) -> float:
    """Operations a second of MLX's matrix product on its device, measured for a quarter of a second."""
    one = mx.random.normal((WIDTH, WIDTH)).astype(dtype)
    return _rate(lambda: mx.eval(one @ one))


def matrix_rate() -> float:
    """The same of NumPy's in float32, which moments and roundings are computed with."""
    one = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    return _rate(lambda: one @ one)


def _rate(multiply: Callable[[], object]) -> float:
    """The fastest of the products that fit into the time: others may want the machine, too."""
    multiply()  # whatever is built at the first time
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * WIDTH**3 / best
