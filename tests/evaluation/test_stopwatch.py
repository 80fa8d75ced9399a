"""Seconds that survive a kill."""

import pytest

from mlxquant.errors import ArtifactError
from mlxquant.evaluation import stopwatch
from mlxquant.evaluation.stopwatch import Stopwatch, kept_seconds
from mlxquant.progress import silent


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_a_resumed_job_counts_on(tmp_path, clock):
    path = tmp_path / "seconds.json"
    first = Stopwatch(path, "job")
    clock[0] += 5
    assert first.keep() == 5
    clock[0] += 100  # killed, and much later
    second = Stopwatch(path, "job")
    clock[0] += 2
    assert second.seconds == 7
    assert kept_seconds(path, "job") == 5
    assert Stopwatch(path, "another").seconds == 0
    assert kept_seconds(path, "another") is None


def test_it_is_written_while_work_goes_on(tmp_path, clock):
    path, seen = tmp_path / "seconds.json", []
    for item in Stopwatch(path, "job").watching(silent)([0.4, 0.7, 3.0], "work"):
        clock[0] += item
        seen.append(kept_seconds(path, "job"))
    assert seen == [None, None, pytest.approx(1.1)]
    assert kept_seconds(path, "job") == pytest.approx(4.1)


def test_damage_is_one_clear_error(tmp_path):
    path = tmp_path / "seconds.json"
    Stopwatch(path, "job").keep()
    path.write_text(path.read_text().replace('"seconds"', '"second"'))
    with pytest.raises(ArtifactError, match=r"seconds\.json"):
        Stopwatch(path, "job")
