"""The teacher that reads what blocks write from a cache, at the tokens that were kept."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.adapter import Adapter, Stage, State
from ..progress import Progress, silent
from ..sweep.streams import ExactStream
from .block_cache import TOKENS, BlockCache, pick


class CachedTeacher:
    """With ``both`` it also runs the full-precision blocks, for ``inputs``: a cache holds those of the first block
    alone. A batch has as many images as the adapter samples at once.
    """

    def __init__(
        self,
        cache: BlockCache,
        adapter: Adapter,
        sigmas: list[float],
        states: list[State],
        both: bool,
        progress: Progress = silent,
    ):
        self._cache, self._size = cache, adapter.batch
        self._exact = ExactStream(adapter, sigmas, states, progress) if both else None

    def targets(self, stage: Stage) -> list[State]:
        if self._exact is not None:
            self._exact.targets(stage)
        return self._cache.targets(self._cache.blocks.index(stage.name), self._size)

    def inputs(self) -> Sequence[State]:
        assert self._exact is not None
        return self._exact.inputs()

    def pick(self, outputs: State) -> State:
        return {key: pick(value, outputs[TOKENS + key]) for key, value in outputs.items() if TOKENS + key in outputs}
