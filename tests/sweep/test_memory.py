"""Memory is given back where the system can take it."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_nobody_holds_goes_back():
    code = """
import mlxquant, mlx.core as mx
from pathlib import Path
from mlxquant.sweep.memory import give_back
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
arrays = [mx.ones((512, 512)) for _ in range(200)]
mx.eval(arrays)
full = resident()
kept = arrays[-1]  # behind the others, so that the heap cannot shrink by itself
del arrays
give_back()
assert full - resident() > 0.8 * 199 * 2**20, (full, resident())
give_back()
assert mx.get_cache_memory() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
