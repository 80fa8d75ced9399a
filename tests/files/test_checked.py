"""Files are whole, checked, or refused with one clear error; a failed write leaves nothing behind."""

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import checked
from mlxquant.files.atomic import atomic_file, atomic_folder, ensure_writable, refuse_existing
from mlxquant.files.checked import read_json, read_tensors, verify_tensors, write_json, write_tensors
from mlxquant.files.parameters import compact

ARRAYS = {
    "b": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "a": mx.array([1, 2], mx.uint32),
    "c": mx.zeros((3,), mx.float16),
}


@pytest.fixture
def tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, "thing", ARRAYS, {"note": "ü", "number": 3})
    return path


def test_tensors_come_back(tensors):
    arrays, header = read_tensors(tensors, "thing")
    assert header == {"kind": "thing", "version": 1, "note": "ü", "number": 3}
    assert set(arrays) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(np.array(arrays[name]), np.array(value))


def test_equal_input_gives_equal_bytes(tensors, tmp_path):
    again = tmp_path / "y.safetensors"
    write_tensors(again, "thing", dict(reversed(ARRAYS.items())), {"number": 3, "note": "ü"})
    assert again.read_bytes() == tensors.read_bytes()


def read(path):
    return read_tensors(path, "thing")


def test_a_file_is_verified_without_its_arrays(tensors, monkeypatch):
    monkeypatch.setattr(checked, "PIECE", 5)
    assert verify_tensors(tensors) == read(tensors)[1]


@pytest.mark.parametrize("reader", [read, verify_tensors])
def test_every_flipped_byte_is_noticed(tensors, reader):
    good = tensors.read_bytes()
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x10
        tensors.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"x\.safetensors"):
            reader(tensors)


@pytest.mark.parametrize("reader", [read, verify_tensors])
@pytest.mark.parametrize("length", [0, 4, 8, 20, 300, -1])
def test_truncation_is_noticed(tensors, length, reader):
    tensors.write_bytes(tensors.read_bytes()[:length])
    with pytest.raises(ArtifactError):
        reader(tensors)


def test_foreign_files_are_refused(tensors, tmp_path):
    with pytest.raises(ArtifactError, match="expected a file of kind 'other', found 'thing'"):
        read_tensors(tensors, "other")
    foreign = tmp_path / "foreign.safetensors"
    mx.save_safetensors(str(foreign), ARRAYS)
    for reader in (read, verify_tensors):
        with pytest.raises(ArtifactError, match="not a tensor file of mlxquant"):
            reader(foreign)
        with pytest.raises(ArtifactError, match="No such file"):
            reader(tmp_path / "none")


@pytest.mark.parametrize("reader", [read, verify_tensors])
def test_other_versions_are_refused(tensors, monkeypatch, reader):
    monkeypatch.setattr(checked, "VERSION", 2)
    with pytest.raises(ArtifactError, match="written in version 1, this mlxquant reads version 2"):
        reader(tensors)


def test_json_comes_back_and_is_checked(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, "facts", {"b": [1, 2.5], "a": None})
    assert read_json(path, "facts") == {"kind": "facts", "version": 1, "a": None, "b": [1, 2.5]}
    text = path.read_text()
    path.write_text(text.replace("2.5", "2.6"))
    with pytest.raises(ArtifactError, match="checksum"):
        read_json(path, "facts")
    path.write_text(text[:-20])
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        read_json(path, "facts")
    path.write_text(json.dumps({"kind": "facts", "version": 99}))
    with pytest.raises(ArtifactError, match="version 99"):
        read_json(path, "facts")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_full_disk_is_one_clear_error(tmp_path):
    with (
        pytest.raises(ArtifactError, match="No space left on device; free some space"),
        atomic_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_replaced_only_by_force(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out) as temporary:
        (temporary / "model.json").write_text("1")
    with pytest.raises(ArtifactError, match="--force"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True) as temporary:
        (temporary / "b").write_text("2")
    assert os.listdir(out) == ["b"]
    assert os.listdir(tmp_path) == ["out"]


def test_failure_inside_a_forced_replacement_keeps_the_old_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(out, force=True):
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def written(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "model.json").write_text("old")
    return tmp_path / "out"


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_text("")
    with (
        pytest.raises(ArtifactError, match="not written by mlxquant"),
        atomic_folder(tmp_path / "pictures", force=True),
    ):
        pass
    with pytest.raises(ArtifactError, match="folder of its own"):
        refuse_existing(Path("/"), force=True)
    assert os.listdir(tmp_path / "pictures") == ["cat.png"]


def test_a_replacement_that_fails_is_undone(written, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".new"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtifactError), atomic_folder(written, force=True):
        pass
    assert (written / "model.json").read_text() == "old"
    assert os.listdir(written.parent) == ["out"]


def test_a_replacement_that_was_killed_is_undone_by_the_next_call(written):
    written.rename(written.with_name(".out.old"))
    written.with_name(".out.new").mkdir()
    with pytest.raises(ArtifactError, match="--force"), atomic_folder(written):
        pass
    assert os.listdir(written.parent) == ["out"]


def test_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"):
        ensure_writable(tmp_path / "file" / "folder")
    with pytest.raises(ArtifactError, match="is a file"):
        refuse_existing(tmp_path / "file", force=True)


def test_compact_is_lossless():
    assert compact(mx.array([0.5, 1.25])).dtype == mx.float16
    assert compact(mx.array([0.1])).dtype == mx.float32
    assert compact(mx.array([1e6])).dtype == mx.float32
