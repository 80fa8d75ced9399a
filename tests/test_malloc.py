"""What glibc keeps of the memory that is freed."""

import sys

import mlx.core as mx
import pytest

import mlxquant._blas as blas

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is one of glibc's")


def faults_of_a_large_array():
    """How many pages the process takes from the system while it makes 128 MB and drops them."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mx.eval(mx.ones(2**25))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch):
    for name in blas.MALLOC_CHOICES:
        monkeypatch.delenv(name, raising=False)


def test_a_large_block_that_was_freed_is_used_again():
    if not blas.keep_freed_memory():
        pytest.skip("the C library is not glibc")
    faults_of_a_large_array()
    assert faults_of_a_large_array() < 2**25 * 4 / 4096 / 10


def test_nothing_is_set_elsewhere_or_where_somebody_has_chosen(monkeypatch):
    class Library:
        def __init__(self, *has):
            for name in has:
                setattr(self, name, lambda *_: pytest.fail("nobody asked for that"))

    for has in ((), ("mallopt",), ("gnu_get_libc_version",)):
        monkeypatch.setattr(blas.ctypes, "CDLL", lambda name, has=has: Library(*has))
        assert not blas.keep_freed_memory()
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda name: Library("mallopt", "gnu_get_libc_version"))
    for name in blas.MALLOC_CHOICES:
        with monkeypatch.context() as context:
            context.setenv(name, "1")
            assert not blas.keep_freed_memory()
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    assert not blas.keep_freed_memory()
