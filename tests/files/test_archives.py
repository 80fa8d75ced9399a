"""What an npz says that it holds is not believed: sizes are compared, and what is compressed is bounded."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import archives
from mlxquant.files.archives import check_members, list_members, read_members

READERS = (list_members, read_members, check_members)


def member(shape, values=b"", dtype="<f8"):
    """A .npy file with a header for ``shape``, whatever its values are."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
    return head.getvalue() + values


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(7, np.int8), "c": np.zeros((0, 4))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_members(tmp_path / "a.npz", "again")
        assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in arrays.items()}
        assert [(m.name, m.shape, m.nbytes) for m in list_members(tmp_path / "a.npz", "again")] == [
            (name, value.shape, value.nbytes) for name, value in arrays.items()
        ]
        assert set(read_members(tmp_path / "a.npz", "again", "ab".__contains__)) == {"a", "b"}
        check_members(tmp_path / "a.npz", "again")


@pytest.mark.parametrize("shape", [(10**13,), (2**31, 2**31), (-1,), (3,), (10**400,), (0, 10**30)])
def test_a_header_that_claims_more_than_is_there_allocates_nothing(tmp_path, shape):
    path = archive(tmp_path / "a.npz", {"x.npy": member(shape, bytes(16))})
    tracemalloc.start()
    for read in READERS:
        with pytest.raises(ArtifactError, match=r"damaged one .*; get it again"):
            read(path, "get it again")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_directory_that_claims_more_than_the_file_has_allocates_nothing(tmp_path):
    data, claimed = member((2**38,), bytes(16)), len(member((2**38,))) + 8 * 2**38
    path = archive(tmp_path / "a.npz", {"x.npy": data})
    with zipfile.ZipFile(path, "a") as file:
        file.infolist()[0].file_size = file.infolist()[0].compress_size = claimed
        file._didModify = True  # so that the directory is written again
    for read in READERS:
        with pytest.raises(ArtifactError, match="longer than the file"):
            read(path, "again")


@pytest.mark.parametrize("text", ["-" * 9000 + "1", "(" * 190, "[" * 190 + "]" * 190, "1+" * 4000 + "1j"])
def test_a_header_that_is_no_header_is_one_error(tmp_path, text):
    data = b"\x93NUMPY\x01\x00" + len(text + "\n").to_bytes(2, "little") + text.encode() + b"\n"
    path = archive(tmp_path / "a.npz", {"x.npy": data})
    for read in READERS:
        with pytest.raises(ArtifactError, match="damaged one"):
            read(path, "again")


@pytest.mark.parametrize("dtype", ["|V0", "|S0", "<U0"])
def test_values_of_no_bytes_are_not_counted_to_any_number(tmp_path, dtype):
    path = archive(tmp_path / "a.npz", {"x.npy": member((10**18,), dtype=dtype)})
    for read in READERS:
        with pytest.raises(ArtifactError, match="values of no bytes"):
            read(path, "again")


def test_compressed_arrays_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 2**20)
    zeros = member((2**16,), bytes(2**19))
    few = archive(tmp_path / "few.npz", {"a.npy": zeros}, zipfile.ZIP_DEFLATED)
    many = archive(tmp_path / "many.npz", {f"{i}.npy": zeros for i in range(3)}, zipfile.ZIP_DEFLATED)
    stored = archive(tmp_path / "stored.npz", {f"{i}.npy": zeros for i in range(3)})
    for read in READERS:
        read(few, "again")
        read(stored, "again")
        with pytest.raises(ArtifactError, match="compressed arrays would take 1573248 bytes, at most 1048576 are read"):
            read(many, "again")


def test_every_byte_is_checked(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0))
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    for read in (read_members, check_members):
        with pytest.raises(ArtifactError, match="Bad CRC-32"):
            read(path, "again")


def test_objects_are_listed_and_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    assert [m.name for m in list_members(tmp_path / "a.npz", "again")] == ["x"]
    with pytest.raises(ArtifactError, match="Object arrays"):
        read_members(tmp_path / "a.npz", "again")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"no zip"])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    for read in READERS:
        with pytest.raises(ArtifactError, match="not an npz file"):
            read(tmp_path / "a.npz", "again")
    with pytest.raises(ArtifactError, match="No such file"):
        list_members(tmp_path / "none.npz", "again")
