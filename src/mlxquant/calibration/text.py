"""Calibration data of a language model: windows of text, as tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CalibrationError
from ..files.checked import array_digest
from ..models.adapter import Adapter
from ..models.language import NO_TIME, LanguageAdapter, Tokens
from ..models.stages import State
from ..progress import Progress, silent
from .corpus import Corpus
from .objectives import NextToken
from .on_demand import OnDemand
from .probes import Probes, shares


@dataclass(frozen=True)
class TextCalibration:
    """``windows`` [n,T] int32 of one text, ``about`` which there is plain data; ``source`` is the fingerprint of the
    model's weights.
    """

    model: str
    source: str
    windows: Tokens
    about: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """All that it depends on, as plain data."""
        digest = array_digest(mx.array(self.windows))
        return {
            "model": self.model,
            "source": self.source,
            "windows": list(self.windows.shape),
            "tokens": digest,
            **self.about,
        }

    @property
    def sides(self) -> int:
        """A window is a row."""
        return 1

    @property
    def level_samples(self) -> int:
        """All windows: they have one noise level."""
        return len(self.windows)

    def batches(self, adapter: Adapter, size: int | None = None) -> tuple[list[float], OnDemand]:
        """Noise levels, all the same, and chain inputs of at most ``size`` windows."""
        size = adapter.batch if size is None else size
        parts = [self.windows[start : start + size] for start in range(0, len(self.windows), size)]

        def make(index: int) -> State:
            return {"tokens": mx.array(parts[index])}

        return [NO_TIME] * len(parts), OnDemand(make, range(len(parts)))

    def probes(self, adapter: Adapter, held_out: bool = False) -> Probes:
        """See ``CalibrationData``: the distribution of the next token counts."""
        some = replace(self, windows=self.windows[shares(len(self.windows))[held_out]])
        sigmas, states = some.batches(adapter, adapter.rows)
        prompted = [(True,) * len(state["tokens"]) for state in states]
        return Probes(sigmas, states, prompted, 1, NextToken())

    def judged(self, count: int) -> range:
        """Every eighth batch, but at least two: any text shows much the same."""
        return range(0, count, min(8, max(1, count // 2)))

    def renewed(self, adapter: Adapter, progress: Progress = silent, folder: Path | None = None) -> TextCalibration:
        """Text is the same whoever reads it."""
        return self


def read_windows(
    adapter: LanguageAdapter, text: str, samples: int | None = None, length: int | None = None, seed: int = 0
) -> Tokens:
    """Windows [samples,length] int32 at random places of a text that do not overlap, in the order of the text; by
    default as many and as long as the adapter has it. Raises CalibrationError when the text is too short for one.
    """
    samples, length = adapter.samples if samples is None else samples, adapter.context if length is None else length
    adapter.check_length(length)
    tokens = adapter.tokenizer.encode(text)
    return choose_windows(tokens, samples, length, seed)


def choose_windows(tokens: Tokens, samples: int | None, length: int, seed: int = 0) -> Tokens:
    """``samples`` windows [.,length] of a run of tokens, None: all."""
    if length < 1 or (samples is not None and samples < 1):
        raise CalibrationError(f"{samples} windows of {length} tokens to calibrate on; expected at least 1 of both")
    count = len(tokens) // length
    if not count:
        raise CalibrationError(
            f"a text of {len(tokens)} tokens has no window of {length}; pass a longer text or shorter windows"
        )
    windows = np.asarray(tokens[: count * length], np.int32).reshape(count, length)
    if samples is None or samples >= count:
        return windows
    return windows[np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))]


def collect_text(
    adapter: LanguageAdapter, corpus: Corpus, samples: int | None = None, length: int | None = None, seed: int = 0
) -> TextCalibration:
    """Windows of what a corpus has to learn from, for a language model whose layers are found to be a chain.

    Raises AdapterError where they are not, CalibrationError on too short a text, NumericsError on NaN weights.
    """
    adapter.check_finite()
    windows = read_windows(adapter, corpus.train, samples, length, seed)
    adapter.check_chain(mx.array(windows[:1, :16]))
    return TextCalibration(adapter.name, adapter.fingerprint, windows, {"corpus": corpus.facts, "seed": seed})
