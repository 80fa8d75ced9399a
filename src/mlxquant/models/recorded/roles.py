"""What layers are for, guessed from how a module runs: what recipes go by where nobody says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..stages import is_at


class Roles:
    """The guess.

    Args:
        steps: Paths of the blocks, in the order in which they run; none where the module runs whole.
        glue: Layers outside of the blocks by path, and where each first matters: the number of a step before which it
            runs, or how many steps there are for what comes after the last.
        shapes: Of what each layer reads, by path.
    """

    def __init__(self, steps: Sequence[str], glue: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]):
        self._steps, self._glue, self._shapes = steps, glue, shapes

    def of(self, path: str) -> str:
        """The role of a layer."""
        cut = self._glue.get(path)
        if cut == 0:
            return "embedder"
        if end := self._end(path):
            return end
        name = path.rpartition(".")[2]
        if name in ("gate", "router") or (len(self._shapes.get(path, ())) == 2 and self._has_tokens(path)):
            return "modulation"
        if cut == len(self._steps):
            return "output"
        return "attention" if "attn" in path or "attention" in path else "mlp"

    def _end(self, path: str) -> str:
        """What a layer is for that makes up the first or the last block alone, as the convolutions at both ends of a
        UNet do, which stand in its lists; "" for any other.
        """
        if len(self._steps) <= 2:
            return ""
        for step, role in ((self._steps[0], "embedder"), (self._steps[-1], "output")):
            if [other for other in self._shapes if is_at(other, step)] == [path]:
                return role
        return ""

    def _has_tokens(self, path: str) -> bool:
        """Whether other layers of the same block, or of any where it stands in none, read tokens [...,T,D], beside
        which [B,D] is a conditioning.
        """
        block = next((step for step in self._steps if is_at(path, step)), "")
        return any(len(shape) > 2 for other, shape in self._shapes.items() if other.startswith(block))
