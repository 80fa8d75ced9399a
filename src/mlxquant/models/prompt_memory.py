"""Conditioning of the last prompts, each encoded once: text encoders are larger than what draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..sampling.conditioning import Conditioning

KEPT = 256  # prompts, of some MB each


class PromptMemory:
    """Encodes prompts that it does not know, all at once, and keeps the last ``KEPT``, or more where more were asked
    for at once.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, mx.array]] = {}  # the last used last
        self._kept = KEPT

    def encoded(self, prompts: Sequence[str], encode: Callable[[list[str]], Conditioning]) -> Conditioning:
        """Conditioning of prompts.

        Args:
            prompts: B of them.
            encode: What gives the conditioning of those that are not kept, of which no two are equal.

        Returns:
            B rows, evaluated.
        """
        if fresh := [text for text in dict.fromkeys(prompts) if text not in self._rows]:
            found = encode(fresh)
            rows = {text: {key: found[key][row] for key in found.keys()} for row, text in enumerate(fresh)}  # noqa: SIM118
            mx.eval(list(rows.values()))
            self._rows |= rows
        self._kept = max(self._kept, len(set(prompts)))
        for text in prompts:
            self._rows[text] = self._rows.pop(text)
        wanted = [self._rows[text] for text in prompts]
        for text in list(self._rows)[: -self._kept]:
            del self._rows[text]
        return Conditioning(**{key: mx.stack([row[key] for row in wanted]) for key in wanted[0]})
