"""Give MLX's CPU backend a real BLAS, before ``mlx.core`` is first imported, and on Linux memory that it can use again.

The Linux CPU wheel of MLX bundles reference BLAS (about 3 GFLOP/s). Loading an OpenBLAS with global symbols beforehand
makes libmlx bind its ``cblas_*`` calls to it, which is 25 to 30 times faster. macOS uses Accelerate and needs nothing.
Without an OpenBLAS everything still works, slowly.

The last OpenBLAS whose symbols MLX can bind to does not know later processors, and gives them the kernels of the oldest
one, which are 3 to 5 times slower. Those are told which of its kernels they can run.

glibc's malloc gives blocks above 32 MB back to the system as soon as they are freed, and every page that is taken anew
is a fault and a page of zeros. The CPU backend unfolds a picture for each convolution, 100 to 300 MB of it in Stable
Diffusion, and spent a quarter of its time on that. macOS and other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

CHOICE = "OPENBLAS_CORETYPE"  # what OpenBLAS reads as it starts; who has set it knows better
OLDEST = "Prescott"  # the kernels of a processor that OpenBLAS does not know
KERNELS = {  # which others need what of a processor; the fastest first
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "fma"},
    "Haswell": {"avx2", "fma"},
}

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names of what follows, in glibc's malloc.h
KEPT = 2**29  # bytes of a block, and of what is free at the heap's end, that are kept; more is given back
MALLOC_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # who has set one knows better


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is not None and spec.origin is not None:
        library = Path(spec.origin).parent / "lib" / "libopenblas_python.so"
        if library.exists():
            yield str(library)
    system = ctypes.util.find_library("openblas")
    if system is not None:
        yield system


@cache
def prefer_fast_blas() -> str | None:
    """Load an OpenBLAS globally on Linux; return the library's name, or None where none is needed or found."""
    if not sys.platform.startswith("linux"):
        return None
    if "mlx.core" in sys.modules:
        log.warning(
            "mlx was imported before mlxquant, so its matmul runs on slow reference BLAS; import mlxquant first"
        )
        return None
    for name in _candidates():
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            log.debug("could not load %s: %s", name, error)
            continue
        if not hasattr(library, "cblas_sgemm"):
            log.debug("%s has no cblas_sgemm (prefixed symbols?)", name)
            continue
        _use_known_kernels(library, _processor_flags())
        log.debug("MLX's CPU matmul runs on %s", Path(name).name)
        return name
    log.debug(
        "no OpenBLAS found: MLX's CPU matmul will be 25 to 30 times slower; pip install scipy-openblas32==0.3.23.293"
    )
    return None


def _processor_flags() -> set[str]:
    """What the first processor can do, in Linux' words; nothing where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _use_known_kernels(library: ctypes.CDLL, flags: set[str]) -> None:
    """Let an OpenBLAS that has found nothing but its oldest kernels start again with what a processor of these
    ``flags`` can run.
    """
    parts = ("openblas_get_corename", "gotoblas_dynamic_quit", "gotoblas_dynamic_init")
    if CHOICE in os.environ or not all(hasattr(library, part) for part in parts):
        return
    library.openblas_get_corename.restype = ctypes.c_char_p
    wanted = next((kernels for kernels, needed in KERNELS.items() if needed <= flags), None)
    if wanted is None or library.openblas_get_corename().decode() != OLDEST:
        return
    os.environ[CHOICE] = wanted
    try:
        library.gotoblas_dynamic_quit()
        library.gotoblas_dynamic_init()
    finally:
        del os.environ[CHOICE]  # other libraries choose for themselves


def keep_freed_memory() -> bool:
    """Whether glibc has been told to keep what is freed."""
    if not sys.platform.startswith("linux") or any(choice in os.environ for choice in MALLOC_CHOICES):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    return all(library.mallopt(option, KEPT) for option in (MMAP_THRESHOLD, TRIM_THRESHOLD))
