"""One run at a time: who holds a lock, who may take it over, and what is left afterwards."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files.atomic import atomic_file, atomic_folder, claimed, partial_folder
from mlxquant.files.lock import Owner, left_by_a_kill, locked, started

HOLD = """
import sys, time
from pathlib import Path
from mlxquant.files.lock import locked
with locked(Path(sys.argv[1]), inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    time.sleep(600)
"""


class Holder:
    """Another process that holds the lock of a place."""

    def __init__(self, place, inside=False):
        where = [str(place), "inside" if inside else "beside"]
        self.process = subprocess.Popen([sys.executable, "-c", HOLD, *where], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "held\n"

    def end(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def hold():
    holders = []

    def start(place, inside=False):
        holders.append(Holder(place, inside))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


def write_lock(path, **changes):
    path.write_text(replace(Owner.here(), **changes).text)


@pytest.mark.parametrize("inside", [False, True])
def test_the_second_run_gets_one_error_and_changes_nothing(tmp_path, hold, inside):
    place = tmp_path / "out"
    holder = hold(place, inside)
    before = sorted(tmp_path.rglob("*"))
    words = f"{place}: process {holder.process.pid} is writing it; wait for that run"
    with pytest.raises(ArtifactError, match=words), locked(place, inside=inside):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_sleeps_still_holds_it(tmp_path, hold):
    holder = hold(tmp_path / "out")
    os.kill(holder.process.pid, signal.SIGSTOP)
    with pytest.raises(ArtifactError, match="is writing it"), locked(tmp_path / "out"):
        pass
    os.kill(holder.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("inside", [False, True])
def test_the_lock_of_a_killed_run_is_taken_over_and_goes(tmp_path, hold, inside):
    place = tmp_path / "out"
    hold(place, inside).end(signal.SIGKILL)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    with locked(place, inside=inside):
        assert Owner.read(path.read_text()) == Owner.here()
    assert not path.exists()


@pytest.mark.parametrize("left", ["", "not JSON", "[]", '{"host": 1}', '{"host": "", "process": 1e999}', "\udcff"])
def test_a_lock_that_says_nothing_blocks_nobody(tmp_path, left):
    """Its writer was killed between making and filling it."""
    (tmp_path / ".out.lock").write_bytes(left.encode(errors="surrogateescape"))
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_process_is_told_from_a_later_one_with_its_id(tmp_path):
    write_lock(tmp_path / ".out.lock", started="long ago")
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_of_the_file_system_the_owner_decides(tmp_path, hold, monkeypatch, code):
    def unsupported(file, operation):
        raise OSError(code, os.strerror(code))

    place = tmp_path / "out"
    holder = hold(place)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(ArtifactError, match=f"process {holder.process.pid} is writing it"), locked(place):
        pass
    holder.end()
    with locked(place):
        pass
    assert os.listdir(tmp_path) == []


def test_the_lock_of_another_host_says_what_to_remove(tmp_path):
    path = tmp_path / ".out.lock"
    write_lock(path, host="elsewhere", process=17)
    with (
        pytest.raises(ArtifactError, match=f"process 17 on host 'elsewhere' .* remove {path}"),
        locked(tmp_path / "out"),
    ):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_block_within_a_block_is_free_and_another_thread_is_another_run(tmp_path):
    caught = []

    def other():
        try:
            with locked(tmp_path / "out"):
                pass
        except ArtifactError as error:
            caught.append(str(error))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.lock").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} is writing it" in caught[0]
    assert os.listdir(tmp_path) == []


def test_folders_that_were_made_for_nothing_go(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b" / "out", inside=True):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "a" / "out"):
        (tmp_path / "a" / "kept").write_text("")
    assert os.listdir(tmp_path / "a") == ["kept"]


def test_a_lock_that_somebody_removed_by_hand_does_not_take_the_next_ones_with_it(tmp_path):
    path = tmp_path / ".out.lock"
    with locked(tmp_path / "out"):
        path.unlink()
        write_lock(path, host="elsewhere")
    assert path.exists()


def test_a_place_that_cannot_be_locked_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"), locked(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ArtifactError, match="File name too long"), locked(tmp_path / ("x" * 300)):
        pass


def test_when_a_process_started_is_known_while_it_lives():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert started(process.pid) == started(process.pid) != ""
    assert started(process.pid) != started(os.getpid()) == Owner.here().started
    process.communicate(b"\n")
    assert started(process.pid) == ""


def test_what_a_killed_run_left_is_told_from_what_a_living_one_writes(tmp_path):
    me = Owner.here()
    assert not left_by_a_kill(me.tag)
    assert left_by_a_kill(replace(me, started="long ago").tag)
    assert not left_by_a_kill(replace(me, started="long ago", host=socket.gethostname() + "x").tag)
    assert not left_by_a_kill("b")
    for owner in (me, replace(me, started="long ago")):
        (tmp_path / f".a.txt.{owner.tag}.abcdefgh.tmp").write_text("")
    (tmp_path / f".a.txt.b.{me.tag}.abcdefgh.tmp").write_text("")
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [
        f".a.txt.{me.tag}.abcdefgh.tmp",
        f".a.txt.b.{me.tag}.abcdefgh.tmp",
        "a.txt",
    ]


class Killed(BaseException):
    """What would be SIGKILL in another process."""


def kill_at(patch, call):
    """Of the renames and removals of folders that follow, neither the one with this number happens nor any later."""
    calls = []

    def counting(original):
        def counted(*arguments, **options):
            calls.append(arguments)
            if len(calls) >= call:
                raise Killed
            return original(*arguments, **options)

        return counted

    patch.setattr(os, "replace", counting(os.replace))
    patch.setattr(shutil, "rmtree", counting(shutil.rmtree))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_while_a_folder_takes_its_name_leaves_its_progress_or_its_result(tmp_path, call, there):
    """Wherever it comes: afterwards the old state stands, with the progress, or the new one, and nothing else."""
    out = tmp_path / "out"
    if there:
        with atomic_folder(out) as temporary:
            (temporary / "model.json").write_text("old")
    with pytest.MonkeyPatch.context() as patch, suppress(Killed), claimed(out, force=True, finishing=True):
        partial_folder(out).mkdir()
        (partial_folder(out) / "stage").write_text("progress")
        with atomic_folder(out, force=True) as temporary:
            (temporary / "model.json").write_text("new")
            kill_at(patch, call)
    with claimed(out, force=True):
        pass
    if call > 2 + there:  # the old folder and the progress had stepped aside, and the new one had its name
        assert os.listdir(tmp_path) == ["out"]
        assert (out / "model.json").read_text() == "new"
    else:
        assert sorted(os.listdir(tmp_path)) == [*(["out"] if there else []), "out.partial"]
        assert (partial_folder(out) / "stage").read_text() == "progress"
        assert not there or (out / "model.json").read_text() == "old"


def test_a_model_that_is_saved_by_hand_leaves_the_progress_of_an_unfinished_run(tmp_path):
    partial_folder(tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


def test_two_writers_of_one_folder_do_not_meet(tmp_path, hold):
    hold(tmp_path / "out")
    with pytest.raises(ArtifactError, match="is writing it"), atomic_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == [".out.lock"]
