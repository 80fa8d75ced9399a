"""A run that goes on computes with as many BLAS threads as it was begun with, or says that it cannot."""

import json
import logging
import os

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files.blas import FILE, blas_kept_in, loaded_blas, same_blas
from mlxquant.files.training_run import TrainingRun
from mlxquant.pipeline.ledger import Ledger

needs_blas = pytest.mark.skipif(not loaded_blas(), reason="this BLAS cannot be asked for its threads")


def with_threads(count):
    return [{**one, "threads": count} for one in loaded_blas()]


def threads():
    return {one["threads"] for one in loaded_blas()}


@needs_blas
def test_the_threads_are_those_of_before_and_then_again_ones_own(tmp_path, caplog):
    own = threads()
    for count in (1, 2):
        with same_blas(with_threads(count), tmp_path):
            assert threads() == {count}
        assert threads() == own
    with same_blas(None, tmp_path):
        assert threads() == own
    assert caplog.text == ""


@needs_blas
@pytest.mark.parametrize("change", [{"version": "0.0.1"}, {"architecture": "Z80"}, {"library": "libother"}])
def test_another_library_is_one_clear_line(tmp_path, caplog, change):
    before = [{**loaded_blas()[0], **change}, *loaded_blas()[1:]]
    with caplog.at_level(logging.WARNING), same_blas(before, tmp_path):
        pass
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: was begun with")
    assert next(iter(change.values())) in line
    assert "\n" not in line


def test_a_folder_with_progress_records_it_and_gives_it_back(tmp_path):
    with blas_kept_in(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["libraries"] == loaded_blas()
    before = (tmp_path / FILE).read_bytes()
    with same_blas(with_threads(2), tmp_path), blas_kept_in(tmp_path):
        assert threads() <= {1, *(one["threads"] for one in loaded_blas())}
    assert (tmp_path / FILE).read_bytes() == before


@needs_blas
def test_what_one_shell_began_another_goes_on_with(tmp_path):
    """As with OPENBLAS_NUM_THREADS=2 first, and 1 later."""
    with same_blas(with_threads(2), tmp_path), pytest.raises(KeyboardInterrupt), blas_kept_in(tmp_path):
        (tmp_path / "progress").write_text("")
        raise KeyboardInterrupt
    with same_blas(with_threads(1), tmp_path), blas_kept_in(tmp_path):
        assert threads() == {2}


def test_a_run_that_kept_nothing_leaves_no_record(tmp_path):
    with pytest.raises(ZeroDivisionError), blas_kept_in(tmp_path):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("facts", [{}, {"libraries": 3}, {"libraries": [{"library": "x"}]}])
def test_a_record_that_is_none_is_one_clear_error(tmp_path, facts):
    from mlxquant.files.checked import write_json

    write_json(tmp_path / FILE, "blas", facts)
    with pytest.raises(ArtifactError, match="incomplete or foreign"), blas_kept_in(tmp_path):
        pass


@needs_blas
def test_a_ledger_has_it_until_it_is_complete(tmp_path):
    def opened():
        return Ledger.open(tmp_path / "ledger.json", "test", {}, "mlxquant test")

    with same_blas(with_threads(2), tmp_path):
        opened().save()
    ledger = opened()
    with ledger.same_blas():
        assert threads() == {2}
        ledger.save()
        ledger.save(complete=True)
    assert "blas" not in json.loads((tmp_path / "ledger.json").read_text())
    with opened().same_blas():
        assert threads() == {one["threads"] for one in loaded_blas()}


@needs_blas
def test_a_training_has_it_until_it_is_finished(tmp_path):
    trees = {"model": {"weight": mx.ones(3)}}
    with same_blas(with_threads(2), tmp_path):
        TrainingRun(tmp_path, {}, step=1).save(trees)
    run = TrainingRun(tmp_path, {})
    run.resume()
    with run.same_blas():
        assert threads() == {2}
    run.save(trees)  # by a shell with another number
    again = TrainingRun(tmp_path, {})
    again.resume()
    with again.same_blas():
        assert threads() == {2}
    again.save(trees, finished=True)
    assert b"blas" not in (tmp_path / "training.safetensors").read_bytes()


def test_what_a_file_says_of_a_library_is_told_in_short(tmp_path, caplog):
    before = [{"library": "a\nb" * 10**5, "version": {"x": [1] * 10**5}, "architecture": None, "threads": 1}]
    with same_blas(before, tmp_path):
        pass
    (record,) = caplog.records
    assert len(record.getMessage().removeprefix(str(tmp_path))) < 400
    assert "\n" not in record.getMessage()
