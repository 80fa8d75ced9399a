"""Give MLX's CPU backend a real BLAS, before ``mlx.core`` is first imported.

The Linux CPU wheel of MLX bundles reference BLAS (about 3 GFLOP/s). Loading an OpenBLAS with global symbols beforehand
makes libmlx bind its ``cblas_*`` calls to it, which is 25 to 30 times faster. macOS uses Accelerate and needs nothing.
Without an OpenBLAS everything still works, slowly.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


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
        log.debug("MLX's CPU matmul runs on %s", Path(name).name)
        return name
    log.debug(
        "no OpenBLAS found: MLX's CPU matmul will be 25 to 30 times slower; pip install scipy-openblas32==0.3.23.293"
    )
    return None
