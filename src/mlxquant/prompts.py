"""Prompt files: one ``seed<TAB>prompt`` a line, UTF-8, blank lines and lines that start with # ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .artifacts import atomic_file, explain
from .errors import CalibrationError


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seed that its noise is drawn from; the same pair gives the same picture everywhere."""

    seed: int
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file; raises CalibrationError, naming the line, on anything else, and on a file without prompts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error}); save the prompt file as UTF-8") from error
    except OSError as error:
        raise explain(error, path) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        seed, tab, text = line.partition("\t")
        if not tab or not seed.strip().isdecimal() or not text.strip():
            raise CalibrationError(f"{path}, line {number}: expected 'seed<TAB>prompt' with a whole number as seed, found {line!r}")
        prompts.append(Prompt(int(seed), text.strip()))
    if not prompts:
        raise CalibrationError(f"{path} holds no prompts; expected one 'seed<TAB>prompt' a line")
    return prompts


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a prompt file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{p.seed}\t{p.text}\n" for p in prompts), encoding="utf-8")
