"""What is remembered of an array is forgotten the moment that the array is another, and never keeps a replaced array in
memory.
"""

import gc
import weakref

import mlx.core as mx
import pytest

from mlxquant.files.array_memory import ArrayMemory
from mlxquant.files.checked import array_digest

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint8]


class Counted:
    """The sum of an array, and how often it was asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, array):
        self.calls += 1
        return array.astype(mx.float32).sum().item()


@pytest.fixture
def counted():
    return Counted()


@pytest.fixture
def memory(counted):
    return ArrayMemory(counted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_very_same_array_is_computed_once(memory, counted, dtype):
    array = mx.ones((64, 64), dtype)
    assert [memory(array) for _ in range(3)] == [4096.0] * 3
    assert counted.calls == 1


def test_an_equal_array_is_another_array(memory, counted):
    one, other = mx.ones((8,)), mx.ones((8,))
    assert memory(one) == memory(other)
    assert counted.calls == 2


def change_once(array):
    array += 1


def change_twice(array):
    """Memory of the first may be used again for the second."""
    for _ in range(2):
        array += 1
        mx.eval(array)


def change_one_number(array):
    array[0] = 9


def change_lazily(array):
    array *= mx.array(2).astype(array.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [change_once, change_twice, change_one_number, change_lazily])
def test_changes_in_place_are_noticed(memory, change, dtype):
    array = mx.ones((100_000,), dtype)
    before = memory(array)
    same = id(array)
    change(array)
    assert id(array) == same  # so the object itself tells nothing
    assert memory(array) == array.astype(mx.float32).sum().item() != before


def test_many_changes_in_a_row_are_all_noticed():
    memory, array, seen = ArrayMemory(array_digest), mx.zeros((1000,)), set()
    for _ in range(200):
        array += 1
        seen.add(memory(array))
    assert len(seen) == 200
    assert len(memory) == 1


def test_other_arrays_in_the_place_of_dead_ones_are_computed(memory):
    for value in range(200):
        assert memory(mx.full((16,), value, mx.float32)) == 16 * value
    assert len(memory) == 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_replaced_array_is_not_kept(memory, dtype):
    array = mx.ones((1 << 20,), dtype)
    memory(array)
    alive, held = weakref.ref(array), mx.get_active_memory()
    array = None
    gc.collect()
    assert alive() is None
    assert len(memory) == 0
    assert mx.get_active_memory() <= held - (1 << 20) * dtype.size


def test_what_an_array_held_before_a_change_goes_with_the_next_question(memory):
    array = mx.ones((1 << 20,))
    memory(array)
    array += 1
    mx.eval(array)
    held = mx.get_active_memory()
    memory(array)
    assert mx.get_active_memory() <= held - array.nbytes


def test_a_failure_is_not_remembered():
    attempts = []

    def compute(array):
        attempts.append(array)
        if len(attempts) == 1:
            raise ValueError("not this time")
        return "result"

    memory, array = ArrayMemory(compute), mx.ones((2,))
    with pytest.raises(ValueError, match="not this time"):
        memory(array)
    assert memory(array) == "result"


def test_a_memory_that_is_gone_leaves_its_arrays_alone():
    array = mx.ones((1 << 20,))
    memory = ArrayMemory(array_digest)
    memory(array)
    gone = weakref.ref(memory)
    del memory
    assert gone() is None
    held = mx.get_active_memory()
    del array
    assert mx.get_active_memory() <= held - (1 << 22)
