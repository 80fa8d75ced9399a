"""What was measured comes back as it was, to the one job that it belongs to."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import checked
from mlxquant.files.kept_arrays import KeptArrays, KeptFacts, Measurements

FOUND = {"a/b": np.array([[1 / 3, -0.0], [np.nextafter(1, 2), 5e-324]]), "c": np.array([np.pi])}


def test_numbers_come_back_bit_for_bit(tmp_path):
    Measurements(tmp_path, {"job": 1}).save("some.stage", FOUND)
    again = Measurements(tmp_path, {"job": 1}).load("some.stage")
    assert {name: table.tobytes() for name, table in again.items()} == {
        name: table.tobytes() for name, table in FOUND.items()
    }
    assert {table.shape for table in again.values()} == {(2, 2), (1,)}
    assert Measurements(tmp_path, {"job": 1}).load("some") is None


def test_nothing_is_as_good_as_something(tmp_path):
    Measurements(tmp_path, 1).save("stage", {})
    assert Measurements(tmp_path, 1).load("stage") == {}


def test_another_job_measures_for_itself(tmp_path):
    Measurements(tmp_path, {"job": 1}).save("stage", FOUND)
    assert Measurements(tmp_path, {"job": 2}).load("stage") is None


def test_without_a_folder_nothing_is_kept():
    nowhere = Measurements(None, 1)
    nowhere.save("stage", FOUND)
    assert nowhere.load("stage") is None


def test_a_damaged_file_is_refused_with_the_remedy(tmp_path):
    Measurements(tmp_path, 1).save("stage", FOUND)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        ArtifactError, match=r"stage\.measurement\.safetensors.*checksum.*--no-resume, or remove the file"
    ):
        Measurements(tmp_path, 1).load("stage")


def test_arrays_and_their_header_are_one_job_s(tmp_path):
    mine, other = (KeptArrays(tmp_path / "kept.safetensors", "stage", job, "it is made again") for job in "ab")
    assert mine.load() is None
    mine.save({"w": mx.array([1.5, -2.0])}, {"facts": {"n": 1}})
    arrays, header = mine.load()
    assert (np.array(arrays["w"]).tolist(), header["facts"], header["job"]) == ([1.5, -2.0], {"n": 1}, "a")
    assert other.load() is None
    mine.path.write_bytes(b"no")
    with pytest.raises(ArtifactError, match="pass --no-resume, or remove the file: it is made again"):
        mine.load()
    mine.clear()
    assert mine.load() is None


def test_facts_are_one_job_s(tmp_path):
    mine, other = (KeptFacts(tmp_path / "kept.json", "cost", job) for job in "ab")
    assert mine.load() is None
    mine.save({"seconds": 1.5})
    assert mine.load()["seconds"] == 1.5
    assert other.load() is None
    mine.path.write_text(mine.path.read_text().replace("1.5", "2.5"))
    with pytest.raises(ArtifactError, match="checksum"):
        mine.load()


def test_another_version_measures_for_itself(tmp_path, monkeypatch):
    Measurements(tmp_path, 1).save("stage", FOUND)
    monkeypatch.setattr(checked, "versions", lambda: {"mlxquant": "0.0.1", "mlx": "0.0.1"})
    assert Measurements(tmp_path, 1).load("stage") is None
