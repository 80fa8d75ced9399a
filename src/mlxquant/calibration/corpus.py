"""Text to train on and to measure with: the sources of Python's standard library, which every machine has, or any file.

A part is held out. Of the library that is whole modules, about one in twenty, chosen by their path alone, so that the
choice is the same under every version of Python; of a file it is the end.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import CalibrationError

HELD_OUT = 20  # one module in so many; of a file, one character in so many
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "encodings",
}


@dataclass(frozen=True)
class Corpus:
    """Text to learn from and text that is held out; ``source`` names what it is."""

    source: str
    train: str
    held_out: str

    @property
    def facts(self) -> dict[str, object]:
        """What it is, as plain data: figures on other text are not comparable."""
        digest = hashlib.sha256(f"{self.train}\0{self.held_out}".encode()).hexdigest()
        return {"source": self.source, "characters": len(self.train), "held_out": len(self.held_out), "sha256": digest}


def read_corpus(path: Path | None = None) -> Corpus:
    """The text of a file in UTF-8, or the standard library's. Raises CalibrationError where there is none, or too
    little.
    """
    return standard_library() if path is None else text_file(path)


def text_file(path: Path) -> Corpus:
    """The last twentieth of a file is held out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror or error}; expected a text file") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: no text in UTF-8 ({error.reason} at byte {error.start}); convert it first"
        ) from error
    if len(text) < 2 * HELD_OUT:
        raise CalibrationError(f"{path}: {len(text)} characters are too few; expected some thousand")
    cut = len(text) - len(text) // HELD_OUT
    return Corpus(path.name, text[:cut], text[cut:])


def standard_library() -> Corpus:
    """All modules but tests and tables, one in twenty of them held out."""
    root, parts = Path(sysconfig.get_path("stdlib")), {True: list[str](), False: list[str]()}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not SKIPPED & set(name.split("/")):
            parts[zlib.crc32(name.encode()) % HELD_OUT == 0].append(path.read_text(encoding="utf-8", errors="replace"))
    if not parts[True] or not parts[False]:
        raise CalibrationError(f"{root}: the standard library's sources are not there; name a text file with --data")
    return Corpus(f"Python {sys.version.split()[0]} standard library", "\n".join(parts[False]), "\n".join(parts[True]))
