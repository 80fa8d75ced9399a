"""The ledger: what it lists is what is used, and nothing else is touched."""

import json
import os

import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files.checked import file_digest, write_json
from mlxquant.files.schema import entries, whole
from mlxquant.pipeline.ledger import Ledger, load_npz, read_npz, write_npz

FACTS = {"model": "m", "steps": 3, "parents": {"manifest.json": "abc"}}
ARRAYS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "mm1__x": np.ones(2, np.float16),
    "mm11__x": np.zeros(1, np.int32),
}


def opened(folder, facts=FACTS, **options):
    return Ledger.open(folder / "ledger.json", "test", facts, "mlxquant test", **options)


def filled(folder, complete=True):
    ledger = opened(folder)
    ledger.add_npz("samples/a.npz", ARRAYS)
    ledger.add_npz("b.npz", {"y": np.ones(1)})
    ledger.save(complete)
    return ledger


def test_npz_round_trip_keeps_bytes_dtypes_and_shapes(tmp_path):
    first = write_npz(tmp_path / "a.npz", ARRAYS)
    again = write_npz(tmp_path / "b.npz", dict(reversed(ARRAYS.items())))
    assert first == again
    back = read_npz(tmp_path / "a.npz", first)
    assert set(back) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)
    assert set(load_npz(tmp_path / "a.npz", "mm1__")) == {"mm1__x"}


def test_npz_that_changed_or_went_away_is_refused(tmp_path):
    sha256 = write_npz(tmp_path / "a.npz", ARRAYS)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ArtifactError, match="it was changed"):
        read_npz(tmp_path / "a.npz", sha256)
    (tmp_path / "a.npz").write_text("no npz")
    with pytest.raises(ArtifactError, match="not an npz file, or a damaged one"):
        read_npz(tmp_path / "a.npz", file_digest(tmp_path / "a.npz"))
    with pytest.raises(ArtifactError, match="No such file"):
        read_npz(tmp_path / "none.npz", sha256)


def test_pickled_arrays_are_never_loaded(tmp_path):
    sha256 = write_npz(tmp_path / "a.npz", {"x": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(ArtifactError, match="not an npz file, or a damaged one"):
        read_npz(tmp_path / "a.npz", sha256)


def test_a_ledger_lists_its_files_relative_to_itself(tmp_path):
    ledger = filled(tmp_path / "f")
    back = Ledger.read(tmp_path / "f" / "ledger.json", "test")
    assert (back.facts, back.files, back.complete, back.sha256) == (FACTS, ledger.files, True, ledger.sha256)
    assert set(back.files) == {"samples/a.npz", "b.npz"}
    np.testing.assert_array_equal(back.arrays("samples/a.npz")["x"], ARRAYS["x"])
    assert back.disk_bytes == sum(p.stat().st_size for p in (tmp_path / "f").rglob("*") if p.is_file())
    assert str(tmp_path) not in (tmp_path / "f" / "ledger.json").read_text()
    with pytest.raises(ArtifactError, match=r"lists no file 'c\.npz'"):
        back.arrays("c.npz")
    (tmp_path / "f").rename(tmp_path / "g")
    assert Ledger.read(tmp_path / "g" / "ledger.json", "test").arrays("b.npz")["y"] == [1]


def test_the_same_facts_go_on_and_others_are_refused_by_name(tmp_path):
    filled(tmp_path, complete=False)
    assert len(opened(tmp_path).files) == 2
    changed = {"model": "m", "steps": 4, "seed": 1, "parents": {"manifest.json": "xyz"}}
    with pytest.raises(ArtifactError, match=r"other settings or inputs \(manifest.json, seed, steps\).*--force"):
        opened(tmp_path, changed)
    assert (tmp_path / "b.npz").exists()
    with pytest.raises(ArtifactError, match=r"not finished \(2 files so far\); run 'mlxquant test'"):
        opened(tmp_path).require_complete("mlxquant test")


@pytest.mark.parametrize(
    ("complete", "facts", "options"),
    [(True, FACTS, {"force": True}), (False, {"steps": 9}, {"force": True}), (False, FACTS, {"resume": False})],
)
def test_starting_anew_removes_what_was_listed_and_nothing_else(tmp_path, complete, facts, options):
    filled(tmp_path, complete)
    (tmp_path / "samples" / "mine.txt").write_text("precious")
    ledger = opened(tmp_path, facts, **options)
    assert (ledger.files, ledger.complete) == ({}, False)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["mine.txt"]


def test_a_finished_folder_is_kept_without_force(tmp_path):
    filled(tmp_path)
    assert opened(tmp_path, resume=False).complete
    assert not opened(tmp_path, force=True).complete


def test_a_killed_run_that_was_forced_goes_on_when_it_is_run_again(tmp_path):
    filled(tmp_path, complete=False)
    assert len(opened(tmp_path, force=True).files) == 2


def test_a_step_that_wrote_nothing_binds_nobody(tmp_path):
    opened(tmp_path)
    assert os.listdir(tmp_path) == []
    assert opened(tmp_path, {"steps": 9}).facts == {"steps": 9}


def test_lost_files_are_forgotten_and_the_folder_is_unfinished_again(tmp_path):
    filled(tmp_path)
    (tmp_path / "b.npz").unlink()
    ledger = opened(tmp_path)
    assert list(ledger.files) == ["samples/a.npz"]
    assert not ledger.complete


def test_missing_foreign_and_damaged_ledgers_are_refused(tmp_path):
    path = tmp_path / "ledger.json"
    with pytest.raises(ArtifactError, match="no such file; do this first"):
        Ledger.read(path, "test", "do this first")
    filled(tmp_path)
    with pytest.raises(ArtifactError, match="expected a file of kind 'other', found 'test'"):
        Ledger.read(path, "other")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "complete": False}))
    with pytest.raises(ArtifactError, match="checksum"):
        Ledger.read(path, "test")
    with pytest.raises(ArtifactError, match="or remove this file to let mlxquant test start over"):
        opened(tmp_path, force=True)
    write_json(path, "test", {"made_from": []})
    with pytest.raises(ArtifactError, match="it has no 'files'"):
        Ledger.read(path, "test")


def test_a_fact_is_no_note_and_a_note_no_fact(tmp_path):
    """Whoever reads it asks each for its own names."""
    facts = {"a": 1, "b": 2, "files": {}, "complete": True}
    needs = {"of_facts": entries({"a": whole()}), "of_notes": entries({"b": whole()})}
    path = tmp_path / "ledger.json"
    for names, message in ([], "it has no 'a'"), (["a", "b"], "it has no 'b'"), (["x"], "'x' is missing"):
        write_json(path, "test", {**facts, "made_from": names})
        with pytest.raises(ArtifactError, match=message):
            Ledger.read(path, "test", **needs)
    write_json(path, "test", {**facts, "made_from": ["a"]})
    assert Ledger.read(path, "test", **needs).facts == {"a": 1}


@pytest.mark.parametrize("name", ["../precious.npz", "/precious.npz", "samples/../../precious.npz"])
def test_a_ledger_cannot_name_files_outside_its_folder(tmp_path, name):
    facts = {**FACTS, "made_from": sorted(FACTS), "files": {name: "abc"}, "complete": False}
    write_json(tmp_path / "ledger.json", "test", facts)
    with pytest.raises(ArtifactError, match="not inside its folder"):
        opened(tmp_path, force=True)


def test_a_file_in_the_way_of_a_folder_is_one_clear_error(tmp_path):
    (tmp_path / "samples").write_text("")
    with pytest.raises(ArtifactError, match="samples: File exists"):
        opened(tmp_path).add_npz("samples/a.npz", ARRAYS)
