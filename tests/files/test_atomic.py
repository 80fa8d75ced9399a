"""Files that are on the disk before they have their name, and written by nobody else meanwhile."""

import os

import mlx.core as mx
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import checked, tensor_layout
from mlxquant.files.atomic import atomic_file, atomic_folder, claimed, partial_folder
from mlxquant.files.checked import read_tensors, write_tensors


@pytest.fixture
def calls(monkeypatch):
    """The names of what is synced and renamed, in order, and what a file held when it was synced."""
    made, sync, replace = [], os.fsync, os.replace

    def synced(handle):
        made.append(("fsync", os.pread(handle, 99, 0)))
        sync(handle)

    def renamed(source, target):
        made.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return made


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("whole")
        assert calls == []
    assert calls == [("fsync", b"whole"), ("replace", "x.txt")]


def test_a_file_has_the_rights_of_any_other(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x.txt") as temporary:
            temporary.write_text("whole")
    finally:
        os.umask(mask)
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == 0o640


def test_tensors_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path, raw = tmp_path / "x.safetensors", tensor_layout.raw_bytes
    write_tensors(path, "some", {"a": mx.ones(3), "b": mx.zeros(3)})
    before, seen = path.read_bytes(), []

    def fail(value):
        seen.append(value)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return raw(value)

    monkeypatch.setattr(checked.tensor_layout, "raw_bytes", fail)
    with pytest.raises(checked.ArtifactError, match="free some space"):
        write_tensors(path, "some", {"a": mx.zeros(3), "b": mx.ones(3)})
    assert path.read_bytes() == before
    assert read_tensors(path, "some")[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert partial_folder(tmp_path / "link") == partial_folder(tmp_path / "there")
    with claimed(tmp_path / "link", force=True, finishing=True):
        partial_folder(tmp_path / "link").mkdir()
        with atomic_folder(tmp_path / "link", force=True) as folder:
            (folder / "model.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "model.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_a_link_may_lead_to_what_is_not_there_yet_but_not_to_itself(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "none")
    with atomic_folder(tmp_path / "gone") as folder:
        (folder / "model.json").write_text("new")
    assert (tmp_path / "none" / "model.json").read_text() == "new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ArtifactError, match="loop"), atomic_folder(tmp_path / "loop"):
        pass


def test_a_folder_that_fails_at_its_last_step_is_the_old_one_again(tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    with atomic_folder(out) as folder:
        (folder / "model.json").write_text("old")

    def fails(source, target):
        if os.path.basename(source) == ".out.new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(checked.ArtifactError, match="Input/output error"), atomic_folder(out, force=True) as folder:
        (folder / "model.json").write_text("new")
    assert (out / "model.json").read_text() == "old"
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".new", ".old"))]
