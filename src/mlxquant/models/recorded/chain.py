"""How a module calls its blocks, told by the identity of arrays: what can be run block by block, and what cannot.

A module's blocks stand in lists of its own. Between them is glue: embedders before the first, a norm and a projection
after the last, perhaps a concatenation in the middle or a skip connection. Nobody has to say what the glue does. Where
the model is cut, the module itself is run: blocks before the cut answer with what they wrote already, and the block
behind it stops the run and shows what it is given. MLX computes only what is asked for, so what was cut off costs
nothing.

``Chain.of`` watches one call and gives every array that blocks are given or return a name, a *variable*:

- what a block returns, when the next one is given the very same object (and nobody wrote into it in between);
- what the glue makes before a block (``introduced`` there), such as a conditioning that all blocks then share;
- what the module itself was called with, which needs no name.

What of the earlier blocks' outputs a later piece of glue needs (skips) is found by spoiling: with one output changed
the glue runs again, and what it makes is compared. So is which layers of the glue matter where: a layer belongs to the
first cut at which its output shows.

A chain is checked, not believed: ``RecordedAdapter.verify`` compares what it computes with what was recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .naming import BrokenChainError, Skeleton, Slot, Values, WatchedCall, variables, watch
from .recording import Call
from .trees import Path, arrays, mapped
from .watching import uncompiled, watched


class _Reached(BaseException):
    """A block that was to be reached has been; no error, so that no ``except Exception`` of a module stops it."""


class Chain:
    """The calls of a module's blocks, in their order.

    Attributes:
        steps: One for each block.
        result: What the glue makes after the last block, by its path in the module's result.
        glue: Layers outside of the blocks by path, and the cut to which each belongs: the number of a step before which
            it runs, or that of steps for what comes after the last.
        needs: By cut, the blocks' outputs that the glue there depends on.
    """

    def __init__(self, module: nn.Module, blocks: Mapping[str, nn.Module], first: WatchedCall):
        self.module, self.blocks = module, dict(blocks)
        self._signature, self._written_into = first.signature, first.written_into  # of it all but its arrays
        self.steps, self.result, self.result_reads = first.steps, first.result, first.result_reads
        self.glue: dict[str, int] = {}
        self.needs: dict[int, frozenset[int]] = {}

    @classmethod
    def of(
        cls, module: nn.Module, blocks: Mapping[str, nn.Module], call: Call, layers: Mapping[str, nn.Module]
    ) -> Chain:
        """The chain that a call shows.

        Args:
            module: What was called.
            blocks: Its blocks, by path.
            call: One recorded call.
            layers: The layers outside of the blocks, by path.

        Raises:
            BrokenChainError: See ``naming.watch``.
        """
        first = watch(module, blocks, call)
        chain = cls(module, blocks, first)
        mx.eval(list(first.values.values()))
        chain._find_needs(call, first.skeleton, first.values)
        chain._place(call, first, layers)
        return chain

    def place(self, call: Call, layers: Mapping[str, nn.Module]) -> None:
        """Find where layers outside of the blocks matter that do so in this call, but not in the first.

        Args:
            call: A recorded call that runs as the first does.
            layers: The layers, by path.
        """
        shown = watch(self.module, self.blocks, call)
        mx.eval(list(shown.values.values()))
        self._place(call, shown, layers)

    def skeleton(self, call: Call) -> Skeleton:
        """The trees of another call; nothing is computed.

        Raises:
            BrokenChainError: It does not run its blocks in the same way.
        """
        other = watch(self.module, self.blocks, call, self._written_into)
        if other.signature != self._signature:
            ran = [step.path for step in other.steps]
            same = ran == [step.path for step in self.steps]
            what = "it hands other arrays on" if same else f"it runs the blocks {ran[:4]}… ({len(ran)})"
            raise BrokenChainError(what)
        return other.skeleton

    @property
    def cuts(self) -> list[int]:
        """Where the glue makes something: before steps, and after the last."""
        return [index for index, step in enumerate(self.steps) if step.introduced] + (
            [len(self.steps)] if self.result else []
        )

    def introduced(self, cut: int) -> dict[Path, int]:
        """What the glue makes at a cut."""
        return self.result if cut == len(self.steps) else self.steps[cut].introduced

    def live(self, index: int) -> frozenset[int]:
        """Variables that step ``index`` or anything after it needs, of those that there are before it."""
        needed = set[int](self.result_reads)
        made = set[int](self.result.values())
        for at in range(index, len(self.steps)):
            needed |= self.steps[at].reads
            made |= {*self.steps[at].introduced.values(), *self.steps[at].writes.values()}
        for cut, wanted in self.needs.items():
            if cut >= index:
                needed |= wanted
        return frozenset(needed - made)

    def run_glue(self, call: Call, skeleton: Skeleton, values: Mapping[int, mx.array], cut: int) -> Values:
        """What the glue makes at a cut, not evaluated.

        Args:
            call: Which call of the module.
            skeleton: Its trees.
            values: The variables that there are; blocks before the cut answer with them.
            cut: Before which step; as many as there are steps for after the last.
        """
        found = Values()
        self._glued(call, skeleton, values, cut, found, (cut,))
        return found

    def _glued(
        self,
        call: Call,
        skeleton: Skeleton,
        values: Mapping[int, mx.array],
        stop: int,
        found: Values,
        cuts: Iterable[int],
    ) -> None:
        """Run the module with blocks that answer by ``values``, up to step ``stop``; as many as there are steps stop
        nothing. What is introduced at ``cuts`` goes into ``found``, and what the module's result has that is new.
        """
        places = {step.path: index for index, step in enumerate(self.steps)}
        wanted = set(cuts)

        def answer(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
            index = places[path]
            if index in wanted:
                given = arrays((args, kwargs))
                found.update({number: given[at] for at, number in self.steps[index].introduced.items()})
            if index == stop:
                raise _Reached
            return self.filled(skeleton.wrote[index], call, skeleton, {**found, **values})

        with uncompiled(), watched(self.blocks, answer):
            try:
                result = arrays(call.again(self.module))
            except _Reached:
                return
        found.update({number: result[path] for path, number in self.result.items()})

    @staticmethod
    def filled(tree: Any, call: Call, skeleton: Skeleton, values: Mapping[int, mx.array]) -> Any:
        """A tree with arrays in its slots, new objects all of them, which anybody may write into. Variables that are
        gone are zeros, which nobody asks for.
        """

        def fill(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            if leaf.variable is None:
                return copy.copy(call.arrays[leaf.given])
            if leaf.variable in values:
                return copy.copy(values[leaf.variable])
            shape, dtype = skeleton.shapes[leaf.variable]
            return mx.zeros(shape, dtype)

        return mapped(tree, fill)

    def _find_needs(self, call: Call, skeleton: Skeleton, values: Values) -> None:
        """Which outputs of earlier blocks the glue at each cut depends on."""
        self.needs = {cut: frozenset() for cut in self.cuts}
        later = [cut for cut in self.cuts if cut > 0]
        if not later:
            return
        exact = self._all_glue(call, skeleton, values, later)
        for index, tree in enumerate(skeleton.wrote):
            for number in variables(tree):
                spoilt = {**values, number: _spoilt(values[number])}
                for cut in _changed(exact, self._all_glue(call, skeleton, spoilt, later)):
                    if cut > index:
                        self.needs[cut] |= {number}

    def _all_glue(
        self, call: Call, skeleton: Skeleton, values: Mapping[int, mx.array], cuts: Sequence[int]
    ) -> dict[int, list[mx.array]]:
        """What the glue makes at each of these cuts where blocks answer by ``values``, evaluated."""
        wrote = {number for tree in skeleton.wrote for number in variables(tree)}
        found = Values()
        outputs = {number: value for number, value in values.items() if number in wrote}
        self._glued(call, skeleton, outputs, len(self.steps), found, range(len(self.steps)))
        made = {cut: [found[number] for number in self.introduced(cut).values()] for cut in cuts}
        mx.eval(made)
        return made

    def _place(self, call: Call, shown: WatchedCall, layers: Mapping[str, nn.Module]) -> None:
        """The cut at which each layer outside of the blocks first matters; layers that matter nowhere have none."""
        if not layers or not self.cuts:
            return
        skeleton, values = shown.skeleton, shown.values
        exact = self._all_glue(call, skeleton, values, self.cuts)
        called = list[str]()

        def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
            if path not in called:
                called.append(path)
            return run()

        with watched(layers, note):
            self._all_glue(call, skeleton, values, [])
        for path in called:

            def spoil(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
                return mapped(run(), lambda at, leaf: _spoilt(leaf) if isinstance(leaf, mx.array) else leaf)

            with watched({path: layers[path]}, spoil):
                changed = _changed(exact, self._all_glue(call, skeleton, values, self.cuts))
            if changed:
                self.glue[path] = min(changed)


def _spoilt(value: mx.array) -> mx.array:
    """Another array of the same shape, which shows in whatever is computed from it."""
    if mx.issubdtype(value.dtype, mx.floating):
        return mx.full(value.shape, mx.nan, value.dtype)
    return mx.logical_not(value) if value.dtype == mx.bool_ else value + 1


def _changed(before: Mapping[int, list[mx.array]], after: Mapping[int, list[mx.array]]) -> list[int]:
    """The cuts at which not all arrays are what they were; NaN is never."""
    return [
        cut
        for cut, arrays_before in before.items()
        if any(
            old.shape != new.shape or not bool(mx.array_equal(old, new).item())
            for old, new in zip(arrays_before, after[cut], strict=True)
        )
    ]
