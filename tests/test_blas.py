"""MLX's BLAS: which kernels it is given."""

import os
import subprocess
import sys

import pytest

from mlxquant._blas import CHOICE, KERNELS, OLDEST, _use_known_kernels

AVX512 = KERNELS["SkylakeX"] | {"avx2", "sse2"}


class Library:
    """An OpenBLAS that has started, and whose choice the environment decides when it starts again."""

    def __init__(self, name):
        self.name, self.calls = name, []

    class Function:
        def __init__(self, call):
            self.call, self.restype = call, None

        def __call__(self):
            return self.call()

    @property
    def openblas_get_corename(self):
        return self.Function(lambda: self.name.encode())

    def gotoblas_dynamic_quit(self):
        self.calls.append("quit")

    def gotoblas_dynamic_init(self):
        self.calls.append("init")
        self.name = os.environ[CHOICE]


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch):
    monkeypatch.delenv(CHOICE, raising=False)


@pytest.mark.parametrize(
    ("flags", "name"), [(AVX512, "SkylakeX"), ({"avx2", "fma", "avx512f"}, "Haswell"), ({"sse2"}, OLDEST)]
)
def test_an_unknown_processor_gets_the_fastest_kernels_that_it_can_run(flags, name):
    library = Library(OLDEST)
    _use_known_kernels(library, flags)
    assert library.name == name
    assert CHOICE not in os.environ
    assert library.calls == ([] if name == OLDEST else ["quit", "init"])


def test_what_openblas_knows_stays(monkeypatch):
    known = Library("Zen")
    _use_known_kernels(known, AVX512)
    monkeypatch.setenv(CHOICE, OLDEST)
    chosen = Library(OLDEST)
    _use_known_kernels(chosen, AVX512)
    assert not known.calls
    assert not chosen.calls
    assert os.environ[CHOICE] == OLDEST


def test_another_library_is_left_alone():
    _use_known_kernels(object(), AVX512)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has Accelerate")
def test_products_are_right_with_the_kernels_that_were_taken():
    code = """
import mlxquant, mlx.core as mx, numpy as np
from mlxquant._blas import KERNELS, OLDEST, _processor_flags
from mlxquant.files.blas import loaded_blas
a, b = (mx.random.normal((300, 300), key=mx.random.key(i)) for i in range(2))
exact = np.array(a, np.float64) @ np.array(b, np.float64)
assert np.abs(np.array(a @ b, np.float64) - exact).max() < 1e-4
can = any(needed <= _processor_flags() for needed in KERNELS.values())
assert not can or OLDEST not in [one["architecture"] for one in loaded_blas()], loaded_blas()
"""
    environment = {name: value for name, value in os.environ.items() if name != CHOICE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
