"""One run at a time: a lock file that says which process on which host writes a place.

Whoever finds the file knows whether its owner still lives: a dead one's is taken over, so that a kill blocks nobody.
Two things decide. ``flock`` holds for as long as the process lives, whatever becomes of the file, and leaves no race;
but not every network file system has it, and on some it does not reach other hosts. So the owner stands in the file,
too: its process id, when that process started (ids are used again), and its host. That is also what the error tells
whoever comes second. (The package ``filelock`` has either the one or, without any recovery, the other.)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ..errors import ArtifactError
from .explain import explain

INSIDE = ".lock"  # the lock file of a folder that has it inside


@dataclass(frozen=True)
class Owner:
    """A process: its ``host``, its id there, and when it started, in the words of the operating system."""

    host: str
    process: int
    started: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), started(os.getpid()))

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """What a lock file says; None where its writer was killed before it said anything, or it is none of ours."""
        try:
            data = json.loads(text)
            return cls(str(data["host"]), int(data["process"]), str(data["started"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    @property
    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @property
    def tag(self) -> str:
        """Short, for the name of a file that this process writes; ``left_by_a_kill`` understands it."""
        return f"{_short(self.host)}-{self.process}-{_short(self.started)}"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether the process is still there; of another host's that cannot be told, so it is."""
        return not self.is_here or started(self.process) == self.started != ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def left_by_a_kill(tag: str) -> bool:
    """Whether the process that ``Owner.tag`` tells of was one of this host and is gone."""
    match = re.fullmatch("([0-9a-f]{8})-([0-9]+)-([0-9a-f]{8})", tag)
    if match is None:
        return False
    host, process, start = match.groups()
    return host == _short(socket.gethostname()) and _short(started(int(process))) != start


def started(process: int) -> str:
    """When a process started, "" where there is none: what tells it from a later one with the same id."""
    if process == os.getpid():
        return _own_start(process)
    return _start(process)


@cache
def _own_start(process: int) -> str:
    return _start(process)


def _start(process: int) -> str:
    try:
        state, *_ = fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    else:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if state in "ZX" else f"{fields[19]} ticks after boot {boot}"  # a zombie writes nothing any more
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    return found.stdout.strip()  # macOS, which has no /proc


_held: dict[str, int] = {}  # lock files of this process, and the thread that holds each
_registry = threading.Lock()


@contextmanager
def locked(place: Path, *, inside: bool = False) -> Iterator[None]:
    """Be the only run that writes ``place`` until the block ends; a block within a block on the same place is free.

    The lock file is ``.NAME.lock`` beside the place or, for a folder that may be all that one can write, ``INSIDE``
    of it; folders on the way are made. Raises ArtifactError when another run has it: that of a process that
    lives on this host, or of any on another, and when the file cannot be written.
    """
    place = Path(os.path.abspath(place))
    path = place / INSIDE if inside else place.with_name(f".{place.name}.lock")
    with _registry:
        mine = _held.get(str(path)) == threading.get_ident()
    if mine:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path, place)
    except OSError as error:
        _remove_empty(made)
        raise explain(error, path.parent if error.errno in (errno.EEXIST, errno.ENOTDIR) else path) from error
    with _registry:
        _held[str(path)] = threading.get_ident()
    try:
        yield
    finally:
        with _registry:
            del _held[str(path)]
        if _is(path, file):
            path.unlink(missing_ok=True)  # before the lock goes: nobody else can have made another one in its place
        os.close(file)
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that has something in it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _take(path: Path, place: Path) -> int:
    """The open lock file, ours; raises ArtifactError when it is another run's."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _flock(file)
            owner = Owner.read(os.read(file, 4096).decode(errors="replace"))
            if not free or (owner is not None and owner.lives):
                raise _taken(place, path, owner)
            if _is(path, file):  # and was not removed by the run before us while we waited for nothing
                os.ftruncate(file, 0)
                os.pwrite(file, Owner.here().text.encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int) -> bool:
    """Whether nobody else has this file locked; on a file system without such locks nobody has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def _is(path: Path, file: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _taken(place: Path, path: Path, owner: Owner | None) -> ArtifactError:
    if owner is None or (owner.is_here and owner.lives):
        who = "another run" if owner is None else f"process {owner.process}"
        return ArtifactError(f"{place}: {who} is writing it; wait for that run, or choose another place")
    return ArtifactError(
        f"{place}: process {owner.process} on host {owner.host!r} is writing it; wait for that run, or choose another"
        f" place, or, if that host has no such run any more, remove {path}"
    )
