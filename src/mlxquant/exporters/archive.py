"""A folder of ours as one file, smaller by what its codes do not need, and back, byte for byte.

Codes are not equally frequent: on a grid that holds nearly all of its weights, 4 bits of a Gaussian say 3.6. A Huffman
code of bytes with whole codes in them comes within 2 % of that, and zlib makes one of every 64 kB. Codes of 2, 4 and 8
bits fill bytes as they are. Others straddle them, which hides how frequent they are: of these, bytes hold as many codes
as fit. Arithmetic coding would win another half per cent, and wants a library or a loop in NumPy.

The file is a tar in gzip, so that ``tar xzf`` lists it and, where all codes fill bytes, gives the very folder; a file
whose bytes were laid out anew has ``.codes`` behind its name there. ``archive.json`` comes first: every file with its
size, its checksum, and where its codes are. Nothing is unpacked that does not match it.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..contents.reader import read_contents
from ..errors import ArtifactError, reason
from ..files import schema
from ..files.atomic import OURS, atomic_file, atomic_folder
from ..files.checked import VERSION, canonical, digest, file_digest, read_json, versions
from ..files.explain import explain
from ..files.lock import locked
from ..grids.packing import pack, unpack
from ..layers.names import WEIGHT
from ..progress import Progress, silent

KIND, INDEX, REWRITTEN = "archive", "archive.json", ".codes"
LARGEST_INDEX = 2**26  # bytes
PIECE = 2**22  # bytes that are held at a time
BLOCK = 512  # of a tar
MEMORY = 9  # zlib's most: a Huffman code serves for 64 kB, and takes a tenth of a per cent of them
WHOLE = 2**63 - 1
Piece = tuple[int, int, int]  # first and last byte in a file, and the bits of the codes there; 0 for what is none
DAMAGED = (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, ValueError, KeyError, TypeError)


def _stretch(value: Any, where: str) -> None:
    """The schema of where codes are: whole words of whole codes."""
    schema.array_of(schema.whole(most=WHOLE), 3, 3)(value, where)
    start, end, bits = value
    if not (2 <= bits <= 8 and start < end and (end - start) % (4 * bits) == 0):
        raise schema.MismatchError(f"{where}: {value} is no stretch of codes")


STRUCTURE = schema.entries(
    {
        "files": schema.array_of(
            schema.entries(
                {
                    "name": schema.inside,
                    "bytes": schema.whole(most=WHOLE),
                    "sha256": schema.text,
                    "codes": schema.array_of(_stretch),
                }
            ),
            1,
        )
    }
)


def write_archive(folder: Path, out: Path, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Write a folder's files as one file: whole, or not at all.

    Args:
        folder: What a command of ours wrote. What has checksums is verified first.
        out: The file, such as ``model.tar.gz``.
        force: Whether to replace an archive.
        progress: Of the bytes of each file.

    Returns:
        ``out``, ``bytes``, ``bytes_before`` of the folder's files, and how many ``layers`` have their codes coded.

    Raises:
        ArtifactError: The folder is damaged or none of ours, or the file is there already or cannot be written.
    """
    if not any((folder / name).is_file() for name in OURS):
        raise ArtifactError(f"{folder}: not a folder that mlxquant wrote; name one that has {', '.join(OURS)}")
    with locked(out):
        _refuse_existing(out, force)
        codes = _codes(folder)
        names = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        files = [
            {
                "name": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
                "codes": sorted(codes.get(path, [])),
            }
            for path in names
        ]
        facts = {"kind": KIND, "version": VERSION, "files": files, **versions()}
        with atomic_file(out) as temporary, temporary.open("wb") as file:
            squeezed = _Squeezed(file)
            index = canonical({**facts, "sha256": digest(facts)}).encode()
            _add(squeezed, INDEX, len(index))
            squeezed.write(index)
            squeezed.write(_padding(len(index)))
            for path, one in zip(names, files, strict=True):
                pieces = _pieces(one)
                stored = sum(map(_stored, pieces))
                _add(squeezed, _name(one), stored)
                with path.open("rb") as source:
                    for piece in progress(pieces, f"packing {one['name']}"):
                        squeezed.write(_spread(source.read(piece[1] - piece[0]), piece[2]), codes=0 < piece[2] < 8)
                squeezed.write(_padding(stored))
            squeezed.write(bytes(2 * BLOCK))
            squeezed.close()
    before = sum(path.stat().st_size for path in names)
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "bytes_before": before,
        "layers": sum(map(len, codes.values())),
    }


def unpack_archive(file: Path, out: Path, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder that an archive was made of, every file byte for byte: whole, or not at all.

    Args:
        file: What ``write_archive`` wrote.
        out: The folder.
        force: Whether to replace a folder that mlxquant wrote.
        progress: Of the bytes of each file.

    Returns:
        ``out``, ``bytes`` of the folder's files, and how many ``files``.

    Raises:
        ArtifactError: The file is missing, damaged or no archive, there is no room, or the folder may not be written.
    """
    with atomic_folder(out, force) as folder, _opened(file) as (stream, tar):
        index = _index(tar, folder)
        size = sum(one["bytes"] for one in index)
        if size > (free := shutil.disk_usage(folder).free):
            raise ArtifactError(f"{file}: holds {size} bytes, and {out.parent} has room for {free}; make room")
        for one in index:
            pieces = _pieces(one)
            source = _next(tar, _name(one), sum(map(_stored, pieces)))
            path, hasher = folder / one["name"], hashlib.sha256()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as target:
                for piece in progress(pieces, f"unpacking {one['name']}"):
                    raw = _gathered(source.read(_stored(piece)), piece)
                    hasher.update(raw)
                    target.write(raw)
            if hasher.hexdigest() != one["sha256"]:
                raise ValueError(f"{one['name']} is not what was packed")
        if tar.next() is not None:
            raise ValueError("it holds more than it says")
        while stream.read(PIECE):  # the checksum of the last stretch is compared at its end
            pass
    return {"out": str(out), "bytes": size, "files": len(index)}


@contextmanager
def _opened(file: Path) -> Iterator[tuple[gzip.GzipFile, tarfile.TarFile]]:
    """An archive, read from its beginning to its end; what is wrong with it, also later, is an ArtifactError."""
    try:
        raw = file.open("rb")
    except OSError as error:
        raise explain(error, file) from error
    try:
        with raw, gzip.open(raw) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield stream, tar
    except DAMAGED as error:
        raise ArtifactError(
            f"{file}: not an archive of mlxquant, or a damaged one ({reason(error)}); write or download it anew"
        ) from error


def _index(tar: tarfile.TarFile, folder: Path) -> list[dict[str, Any]]:
    """What an archive says of its files; ``folder`` is empty and stays so."""
    entry = tar.next()
    if entry is None or entry.name != INDEX or not 0 < entry.size <= LARGEST_INDEX:
        raise ValueError(f"it does not begin with {INDEX}")
    path = folder / INDEX
    path.write_bytes(_content(tar, entry).read())
    try:
        files: list[dict[str, Any]] = read_json(path, KIND, STRUCTURE)["files"]
    except ArtifactError as error:
        raise ValueError(f"{INDEX} is not as it was written") from error
    path.unlink()
    if len({one["name"] for one in files}) != len(files):
        raise ValueError("it names a file twice")
    return files


def _next(tar: tarfile.TarFile, name: str, size: int) -> IO[bytes]:
    """The content of the next file, which must be this one."""
    entry = tar.next()
    if entry is None or (entry.name, entry.size) != (name, size):
        found = "nothing" if entry is None else f"{entry.name[:80]!r} of {entry.size} bytes"
        raise ValueError(f"expected {name} of {size} bytes, found {found}")
    return _content(tar, entry)


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(entry) if entry.isreg() else None
    if content is None:
        raise ValueError(f"{entry.name[:80]!r} is no file")
    return content


def _refuse_existing(out: Path, force: bool) -> None:
    """Raise ArtifactError where a file is there and may not be replaced: never what is no archive."""
    if not out.exists():
        return
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder; choose a file, such as {out.name}.tar.gz")
    if not force:
        raise ArtifactError(f"{out} exists; choose another file or pass --force to replace it")
    try:
        with gzip.open(out) as stream:
            ours = stream.read(len(INDEX)) == INDEX.encode()
    except (OSError, EOFError, zlib.error):
        ours = False
    if not ours:
        raise ArtifactError(f"{out} is no archive of mlxquant, so --force does not replace it; choose another file")


def _codes(folder: Path) -> dict[Path, list[Piece]]:
    """Where in which file packed codes are, and of how many bits; all checksums are verified on the way."""
    found: dict[Path, list[Piece]] = {}
    for place in sorted({path.parent for path in folder.rglob("*.safetensors")}):
        for layer in read_contents(place).layers:
            part = layer.parts.get(WEIGHT)
            if part is not None and isinstance(part.place, int):
                unit = 4 * layer.format.bits  # bytes of 32 codes
                if whole := part.nbytes // unit * unit:
                    found.setdefault(part.file, []).append((part.place, part.place + whole, layer.format.bits))
    return found


def _pieces(one: dict[str, Any]) -> list[Piece]:
    """All of a file in order, cut to what is held at a time."""
    stretches, position = list[Piece](), 0
    for start, end, bits in one["codes"]:
        stretches += [(position, start, 0), (start, end, bits)]
        position = end
    stretches.append((position, one["bytes"], 0))
    if any(start > end for start, end, _ in stretches):
        raise ValueError(f"the codes of {one['name']} overlap or lie outside of it")
    pieces = []
    for start, end, bits in stretches:
        step = PIECE // (4 * bits) * 4 * bits if bits else PIECE
        pieces += [(at, min(at + step, end), bits) for at in range(start, end, step)]
    return pieces


def _name(one: dict[str, Any]) -> str:
    """A file's in the tar."""
    return one["name"] + (REWRITTEN if any(8 % bits for _, _, bits in one["codes"]) else "")


def _stored(piece: Piece) -> int:
    """Bytes of a piece in the tar."""
    start, end, bits = piece
    return (end - start) // (4 * bits) * 32 // (8 // bits) if bits else end - start


def _spread(raw: bytes, bits: int) -> bytes:
    """Packed codes as bytes with as many whole codes as fit."""
    if not bits or 8 % bits == 0:
        return raw
    codes = unpack(np.frombuffer(raw, "<u4").reshape(-1, bits), bits, 32)
    several = codes.reshape(-1, 8 // bits)
    return np.sum(several << (bits * np.arange(8 // bits, dtype=np.uint8)), 1, dtype=np.uint8).tobytes()


def _gathered(stored: bytes, piece: Piece) -> bytes:
    """The inverse of ``_spread``."""
    bits = piece[2]
    if len(stored) != _stored(piece):
        raise ValueError("it ends early")
    if not bits or 8 % bits == 0:
        return stored
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    codes = np.frombuffer(stored, np.uint8)[:, None] >> shifts & np.uint8(2**bits - 1)
    return pack(codes.reshape(-1, 32), bits).astype("<u4").tobytes()


def _add(squeezed: _Squeezed, name: str, size: int) -> None:
    """A file's header, the same for the same file."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    squeezed.write(entry.tobuf(tarfile.PAX_FORMAT))


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


class _Squeezed:
    """A gzip file in members, one after the other: of codes, which do not repeat, Huffman coded alone; of all else as
    usual, codes of 8 bits among it: in careful layers rows resemble each other.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._codes = file, False
        self._member = self._new()

    def _new(self) -> Any:
        strategy = zlib.Z_HUFFMAN_ONLY if self._codes else zlib.Z_DEFAULT_STRATEGY
        return zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS, MEMORY, strategy)

    def write(self, raw: bytes, codes: bool = False) -> None:
        if codes != self._codes:
            self.close()
            self._codes = codes
            self._member = self._new()
        self._file.write(self._member.compress(raw))

    def close(self) -> None:
        """End the member; without one more nothing may follow."""
        self._file.write(self._member.flush())
