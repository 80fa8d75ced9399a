"""Our tensor files are safetensors files, byte for byte what the safetensors crate writes, and are never held twice in
memory.
"""

import hashlib
import json
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mlxquant.errors import ArtifactError
from mlxquant.files import checked, tensor_layout
from mlxquant.files.checked import KEY, VERSION, array_digest, read_tensors, write_tensors

MIXED = {
    "zz": mx.array([[1.5, -2.0]], mx.float32),
    "a.bits": mx.array([[1, 2, 3]], mx.uint32),
    'quoted "ü"\n\x01\x7f': mx.array([7], mx.uint8),
    "scalar": mx.array(3.0, mx.float16),
    "empty": mx.zeros((0, 4), mx.float32),
    "empty half": mx.zeros((3, 0), mx.float16),
    "rng": mx.array(np.array([2**63 + 1], np.uint64)),
    "b.codes": mx.array([-3, 4, 5], mx.int8),
    "b.index": mx.array([-1, 2**30], mx.int32),
    "transposed": mx.arange(12, dtype=mx.float16).reshape(3, 4).T,
    "ab": mx.array([0.25], mx.float16),
}
BRAIN = mx.array([[1.0, -2.5, 3e38]], mx.bfloat16)


def written(tmp_path, arrays, header=None):
    path = tmp_path / "x.safetensors"
    write_tensors(path, "thing", arrays, header)
    return path


def by_the_crate(path, arrays):
    """The bytes that safetensors itself writes with the same metadata. It takes the memory of an array as it lies."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    return safetensors.numpy.save({name: np.array(value, order="C") for name, value in arrays.items()}, metadata)


def test_the_bytes_are_those_of_the_safetensors_crate(tmp_path):
    path = written(tmp_path, MIXED, {"note": 'ü "quoted"\n'})
    assert path.read_bytes() == by_the_crate(path, MIXED)


@pytest.mark.parametrize("name", [*MIXED, None])
def test_every_dtype_alone_has_the_crates_bytes(tmp_path, name):
    arrays = {name: MIXED[name]} if name else {}
    path = written(tmp_path, arrays)
    assert path.read_bytes() == by_the_crate(path, arrays)


def test_safetensors_reads_what_we_write(tmp_path):
    found = safetensors.numpy.load_file(written(tmp_path, MIXED))
    assert set(found) == set(MIXED)
    for name, value in MIXED.items():
        assert found[name].dtype == np.array(value).dtype
        np.testing.assert_array_equal(found[name], np.array(value))


def test_bfloat16_is_stored_and_comes_back(tmp_path):
    arrays = {**MIXED, "brain": BRAIN, "no brain": mx.zeros((0,), mx.bfloat16)}
    path = written(tmp_path, arrays)
    stored = dict(safetensors.deserialize(path.read_bytes()))
    assert stored["brain"]["dtype"] == "BF16"
    assert bytes(stored["brain"]["data"]) == bytes(BRAIN.view(mx.uint8))
    by_mlx, (ours, _) = mx.load(str(path)), read_tensors(path, "thing")
    for found in (by_mlx, ours):
        assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
            name: (value.dtype, value.shape) for name, value in arrays.items()
        }
        for name, value in arrays.items():
            assert mx.array_equal(found[name], value)


def test_bfloat16_lies_where_the_crate_puts_it(tmp_path):
    """Between int32 and float16: the crate reads only files whose tensors follow each other, so a wrong order would not
    be noticed.
    """
    values = {
        "half": mx.zeros((1,), mx.float16),
        "brain": BRAIN,
        "index": mx.zeros((1,), mx.int32),
        "code": mx.zeros((1,), mx.int8),
    }
    data = written(tmp_path, values).read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(entries) == ["__metadata__", "index", "brain", "half", "code"]


@pytest.mark.parametrize("dtype", [mx.bool_, mx.int64, mx.complex64])
def test_dtypes_that_nothing_here_needs_are_refused(tmp_path, dtype):
    with pytest.raises(ArtifactError, match="cannot store"):
        written(tmp_path, {"a": mx.zeros((1,), dtype)})
    assert not list(tmp_path.iterdir())


def damaged(tmp_path, change):
    """A file with an honest checksum whose header says something wrong."""
    facts = {"kind": "thing", "version": VERSION}
    arrays = {"a": mx.zeros((4,)), "b": mx.ones((2, 2))}
    entries = json.loads(tensor_layout.header(arrays, {})[8:])
    change(entries)

    def head(sha256):
        entries["__metadata__"] = {KEY: checked.canonical({**facts, "sha256": sha256})}
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text

    data = b"\0" * 32
    path = tmp_path / "bad.safetensors"
    path.write_bytes(head(hashlib.sha256(head("0" * 64) + data).hexdigest()) + data)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["a"].update(data_offsets=[0, 12]),  # a gap
        lambda e: e["a"].update(data_offsets=[0, 12], shape=[3]),  # a gap that shows in nothing else
        lambda e: e["b"].update(data_offsets=[8, 24]),  # an overlap
        lambda e: e["b"].update(data_offsets=[16, 48], shape=[8]),  # beyond the end
        lambda e: e.pop("b"),  # bytes that are nobody's
        lambda e: e["a"].update(shape=[5]),
        lambda e: e["b"].update(shape=[-2, -2]),
        lambda e: e["a"].update(dtype="F64"),
        lambda e: e["a"].update(dtype=["F32"]),
        lambda e: e.update(a=3),
        lambda e: e["a"].update(data_offsets=[0]),
    ],
)
def test_headers_that_do_not_describe_the_bytes_are_refused(tmp_path, change):
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: not a tensor file of mlxquant, or a damaged one"):
        read_tensors(damaged(tmp_path, change), "thing")


def test_the_damage_above_is_the_damage(tmp_path):
    arrays, _ = read_tensors(damaged(tmp_path, lambda entries: None), "thing")
    assert set(arrays) == {"a", "b"}


def test_nothing_is_copied_to_be_written_or_hashed_and_one_tensor_to_be_read(tmp_path):
    size = 1 << 20
    arrays = {f"{i}": mx.full((size,), i, mx.uint8) for i in range(8)} | {"brain": mx.ones((size,), mx.bfloat16)}
    mx.eval(arrays)
    path = tmp_path / "big.safetensors"
    for work, most in (
        (lambda: write_tensors(path, "thing", arrays), size // 4),
        (lambda: array_digest(arrays["brain"]), size // 4),
        (lambda: read_tensors(path, "thing"), 2 * size + size // 4),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most
