"""Prompt files: one ``seed<TAB>prompt`` a line, UTF-8, blank lines and lines that start with # ignored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import AdapterError, CalibrationError
from ..files.atomic import atomic_file
from ..files.explain import explain

PURPOSES = ("calibration", "evaluation")
LARGEST_SEED = 10**19 - 1  # a key of MLX's random numbers is a uint64


@dataclass(frozen=True)
class Prompt:
    """What to draw and from which noise; the same pair gives the same picture on every machine.

    Args:
        seed: Of the noise that the picture starts from; a whole number.
        text: The prompt.
    """

    seed: int
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: one ``seed<TAB>prompt`` a line, blank lines and lines that start with # ignored.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its prompts, in the order of the lines; at least one.

    Raises:
        CalibrationError: On a line that is anything else, named by its number, and on a file without prompts.
        ArtifactError: When the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error}); save the prompt file as UTF-8") from error
    except OSError as error:
        raise explain(error, path) from error
    return parse_prompts(text, str(path))


def parse_prompts(text: str, source: str) -> list[Prompt]:
    """The prompts in the text of a prompt file; errors name ``source``."""
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        seed, tab, words = line.partition("\t")
        if not tab or not re.fullmatch(r"[0-9]{1,19}", seed.strip()) or not words.strip():
            raise CalibrationError(
                f"{source}, line {number}: expected 'seed<TAB>prompt' with a whole number below 10^19 as seed, found"
                f" {line[:200]!r}"
            )
        prompts.append(Prompt(int(seed), words.strip()))
    if not prompts:
        raise CalibrationError(f"{source} holds no prompts; expected one 'seed<TAB>prompt' a line")
    return prompts


def packaged_prompts(model: str, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
    """Prompts that come with the package, for models that draw anything.

    Args:
        model: Whose they are, for the errors.
        purpose: "calibration" or "evaluation"; the two are disjoint.
        count: How many.
        seed: Shifts the seeds of their noise.

    Raises:
        AdapterError: Another purpose, or more than there are.
    """
    if purpose not in PURPOSES:
        raise AdapterError(f"prompts are for {' or '.join(map(repr, PURPOSES))}, not {purpose!r}")
    text = (files("mlxquant.assets") / f"{purpose}.txt").read_text(encoding="utf-8")
    there = parse_prompts(text, f"{purpose}.txt")
    if count > len(there):
        raise AdapterError(
            f"{model} has {len(there)} prompts of its own for {purpose}, {count} were asked for; pass a file of prompts"
        )
    return [Prompt(seed + prompt.seed, prompt.text) for prompt in there[:count]]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a prompt file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{p.seed}\t{p.text}\n" for p in prompts), encoding="utf-8")
