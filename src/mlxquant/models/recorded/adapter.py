"""An adapter made of a recording: a module that nobody wrote a host for.

Its states hold the number of a recorded call under ``call`` and, by their numbers in the chain, the variables that the
stages hand on. One call is one row, whatever shapes it has: nobody can know along which axis samples lie, so a state is
neither cut nor joined.

What stages hand on is float32, whatever the module computes in, so that errors are measured finer than they are made.

Each block is a stage. A piece of glue with layers in it is a stage before the block that it leads to; one without runs
with that block. The last stage makes the module's result. A module that is no chain is one stage, the whole of it.

In the glue there are layers that matter at several cuts (the embedding of time, say, before the first block and in the
last norm). Such a layer is quantized where it first matters, and runs again later. So the exact stream, which would see
it quantized there, runs inside of ``exactly``, with the layers of the glue as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import AdapterError, CalibrationError
from ...grids.keeping_time import Time, noise_levels
from ...grids.time import Clock
from ...layers.kinds import find_exact_layers, find_layers
from ...layers.tree import get_module, swapped
from ..adapter import Adapter
from ..edges import Edge, check_edges
from ..stages import Stage, State
from .blocks import find_blocks, require_blocks, require_called, some_of
from .chain import Chain
from .naming import BrokenChainError, Skeleton
from .reach import find_reach
from .recording import Call, Recording
from .roles import Roles
from .trees import arrays
from .watching import uncompiled

CALL = "call"
NO_TIME = 0.0  # the noise level of all calls where nobody says how to read it
VERIFIED = 4  # calls that are compared with what was recorded before anything is quantized
TOLERANCES = {mx.float32: 1e-4}  # of the largest value; of results in 16 bits 0.02


class RecordedAdapter(Adapter):
    """A module with recorded calls.

    Args:
        seen: The recording; its module, in full precision, is what is quantized.
        blocks: Paths of the modules to cut between; None for those that stand in the module's own lists, () for none.
        time: Called with the arguments of a call, returns its noise level in [0,1]; None where there is none.
        roles: What a layer is for, by path, where the adapter's own guess is not wanted.
        edges: Which layers read the same tensor, and what can be folded into what wrote it.
        keep: Layers that stay as they are, by path, each with the reason.

    Raises:
        CalibrationError: Nothing was recorded.
        AdapterError: There are no blocks, or they are none of the module's; a call is not computed again as it was
            recorded; an edge cannot be as it says.
    """

    draws = False
    batch = 1
    rows = 1

    def __init__(
        self,
        seen: Recording,
        blocks: Iterable[str] | None = None,
        time: Time | None = None,
        roles: Mapping[str, str] | None = None,
        edges: Sequence[Edge] = (),
        keep: Mapping[str, str] | None = None,
    ):
        self.module, self.name, self.seen = seen.module, type(seen.module).__name__, seen
        self._edges = tuple(edges)
        check_edges(self.name, self.module, self._edges)
        if not len(seen):
            raise CalibrationError(
                f"nothing was recorded: {self.name} was not called inside of mlxquant.recording; run the pipeline"
                " there, and see that it calls this very module"
            )
        self.time, self.timed = time, time is not None
        self.clock = Clock(NO_TIME if time is None else None)
        self._roles_given = dict(roles or {})
        self._widens = True
        self.broken = ""  # why the module is not cut, if it is not
        self.chain: Chain | None = None
        self._skeletons: list[Skeleton] = []
        self.sigmas  # noqa: B018  # before anything that takes time
        every = find_exact_layers(self.module)
        self._reach = find_reach(self.module, every, seen)
        self._left_out, self._reached = {**self._reach.left_out, **(keep or {})}, self._reach.shapes
        if unknown := [path for path in self._roles_given if path not in every]:
            raise AdapterError(f"roles: {self.name} has no layer {unknown[0]!r}; it has {some_of(every)}")
        if blocks is None:
            found = find_blocks(self.module, every)
        else:
            found = require_blocks(self.module, blocks)
            require_called(self.module, found, seen[0])
        if blocks is None and not found and (done := find_layers(self.module)):
            raise AdapterError(
                f"{self.name} is quantized already ({some_of(done)}); build it anew, in full precision, and record that"
            )
        if blocks is None and not found:
            raise AdapterError(
                f"{self.name} has no list of modules with layers inside, so there is nothing to cut it between; name"
                " modules with blocks=[...], or pass blocks=() to run it whole"
            )
        if found:
            self._cut(found)
        elif not self.broken:
            self.broken = "no blocks were wanted"
        steps = [step.path for step in self.chain.steps] if self.chain else list[str]()
        self._roles = Roles(steps, self.chain.glue if self.chain else dict[str, int](), self._reached)
        self._originals: dict[str, nn.Module] = (
            {path: get_module(self.module, path) for path in self.chain.glue} if self.chain else {}
        )
        self._stages = self._make_stages()
        self.verify()

    @classmethod
    def pretrained(cls, place: str = "") -> RecordedAdapter:
        raise AdapterError("a recorded model is whatever module was recorded; load that, and record its calls")

    def _cut(self, found: dict[str, nn.Module]) -> None:
        """Find the chain; where there is none, ``broken`` says why."""
        inside = [f"{path}." for path in found]
        glue = {path: layer for path, layer in self.layers().items() if not path.startswith(tuple(inside))}
        try:
            chain = Chain.of(self.module, found, self.seen[0], glue)
            for index in range(len(self.seen)):
                try:
                    self._skeletons.append(chain.skeleton(self.seen[index]))
                except BrokenChainError as reason:
                    raise BrokenChainError(f"call {index} differs from call 0: {reason}") from None
        except BrokenChainError as reason:
            self.broken, self._skeletons = str(reason), []
            return
        self.chain = chain
        unplaced = glue.keys() - chain.glue.keys()
        for index in sorted({self._reach.first[path] for path in unplaced} - {0}):  # of some calls alone
            chain.place(self.seen[index], {path: glue[path] for path in unplaced - chain.glue.keys()})
        idle = "what it wrote changed nothing that the module returned"
        self._left_out |= dict.fromkeys(unplaced - chain.glue.keys(), idle)

    def left_out(self) -> dict[str, str]:
        """Layers that no recorded call reaches, or to no effect, or that stand at several places, or are to stay."""
        return self._left_out

    def edges(self) -> tuple[Edge, ...]:
        """Those that it was given; what a call does not reach has none."""
        return self._edges

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    @property
    def blocks(self) -> tuple[Stage, ...]:
        names = {step.path for step in self.chain.steps} if self.chain else set()
        return tuple(stage for stage in self._stages if stage.name in names)

    def role(self, path: str) -> str:
        return self._roles_given[path] if path in self._roles_given else self._roles.of(path)

    def describe(self) -> dict[str, Any]:
        raise AdapterError(f"{self.name}: a recorded module is saved by mlxquant.save_module")

    @classmethod
    def blank(cls, description: dict[str, Any]) -> Self:
        raise AdapterError("a recorded module is built by its own code, and loaded by mlxquant.load_module")

    def rows_in(self, state: State) -> int:
        return 1

    def take(self, state: State, rows: slice) -> State:
        return state

    def joined(self, states: Sequence[State]) -> State:
        if len(states) != 1:
            raise AdapterError(f"{self.name}: recorded calls run one by one")
        return states[0]

    @contextmanager
    def exactly(self) -> Iterator[None]:
        replaced = {p: layer for p, layer in self._originals.items() if get_module(self.module, p) is not layer}
        with swapped(self.module, replaced):
            yield

    @cached_property
    def sigmas(self) -> list[float]:
        """The noise level of each call.

        Raises:
            CalibrationError: ``time`` does not give one number in [0,1].
        """
        return [self._sigma(index) for index in range(len(self.seen))]

    def _sigma(self, index: int) -> float:
        if self.time is None:
            return NO_TIME
        call = self.seen[index]
        values = np.unique(noise_levels(self.time, call.args, call.kwargs, f"call {index}"))
        if len(values) != 1 or not 0 <= values[0] <= 1:
            raise CalibrationError(
                f"call {index}: time= gives {values.tolist()[:4]}; expected one noise level in [0,1] for a call"
            )
        return float(values[0])

    def state(self, index: int) -> State:
        """What enters the first stage for a call."""
        return {CALL: mx.array([index], mx.int32)}

    def _make_stages(self) -> tuple[Stage, ...]:
        if self.chain is None:
            return (Stage("whole", tuple(self._reached), self._run_whole),)
        stages = list[Stage]()
        count = len(self.chain.steps)
        for cut, step in enumerate(self.chain.steps):
            mine = tuple(path for path, at in self.chain.glue.items() if at == cut)
            if mine:
                stages.append(Stage(f"before {step.path}".replace("/", "."), mine, self._glue_stage(cut)))
            stages.append(
                Stage(step.path, (step.path,), self._block_stage(cut, glue=not mine and bool(step.introduced)))
            )
        last = tuple(path for path, at in self.chain.glue.items() if at == count)
        return (*stages, Stage("result", last, self._run_result))

    def _unpacked(self, state: State) -> tuple[Call, Skeleton, dict[int, mx.array]]:
        index = int(np.array(state[CALL])[0])
        return self.seen[index], self._skeletons[index], {int(k): v for k, v in state.items() if k != CALL}

    def _packed(self, state: State, values: Mapping[int, mx.array], index: int, also: Iterable[int] = ()) -> State:
        """The state before a step: what it and all after it need."""
        assert self.chain is not None
        wanted = self.chain.live(index) | set(also)
        kept = {str(number): self._precise(value) for number, value in values.items() if number in wanted}
        return {CALL: state[CALL], **kept}

    def _precise(self, value: mx.array) -> mx.array:
        return value.astype(mx.float32) if self._widens and value.dtype in (mx.float16, mx.bfloat16) else value

    def _glue_stage(self, cut: int) -> Callable[[State], State]:
        def run(state: State) -> State:
            assert self.chain is not None
            call, skeleton, values = self._unpacked(state)
            made = self.chain.run_glue(call, skeleton, values, cut)
            return self._packed(state, values | made, cut, made)

        return run

    def _block_stage(self, index: int, glue: bool) -> Callable[[State], State]:
        def run(state: State) -> State:
            assert self.chain is not None
            call, skeleton, values = self._unpacked(state)
            if glue:
                made = self.chain.run_glue(call, skeleton, values, index)
                values = values | {number: self._precise(value) for number, value in made.items()}
            args, kwargs = self.chain.filled(skeleton.given[index], call, skeleton, values)
            with uncompiled():
                wrote = arrays(get_module(self.module, self.chain.steps[index].path)(*args, **kwargs))
            made = {number: wrote[path] for path, number in self.chain.steps[index].writes.items()}
            return self._packed(state, values | made, index + 1)

        return run

    def _run_result(self, state: State) -> State:
        assert self.chain is not None
        call, skeleton, values = self._unpacked(state)
        if self.chain.result:
            values = values | self.chain.run_glue(call, skeleton, values, len(self.chain.steps))
        return self._results(self.chain.filled(skeleton.result, call, skeleton, values))

    def _run_whole(self, state: State) -> State:
        call = self.seen[int(np.array(state[CALL])[0])]
        with uncompiled():
            return self._results(call.again(self.module))

    @staticmethod
    def _results(result: Any) -> State:
        return {f"result{''.join(f'.{part}' for part in path)}": value for path, value in arrays(result).items()}

    def verify(self) -> None:
        """Compare calls that run stage by stage with what was recorded, evenly spread ones.

        Raises:
            AdapterError: They differ; it says by how much, and what may be the reason.
        """
        places = sorted({int(place) for place in np.linspace(0, len(self.seen) - 1, VERIFIED)})
        for index in places:
            recorded = self._results(self.seen[index].result)
            self._widens = False  # to the last bit, as it was recorded
            try:
                got = self.run(self.state(index), self.sigmas[index])
            finally:
                self._widens = True
            for key, wanted in recorded.items():
                if not (mx.issubdtype(wanted.dtype, mx.floating) and wanted.size):
                    continue
                largest = float(mx.abs(wanted.astype(mx.float32)).max())
                off = float(mx.abs(got[key].astype(mx.float32) - wanted.astype(mx.float32)).max())
                if not off <= TOLERANCES.get(wanted.dtype, 0.02) * max(largest, 1e-30):
                    raise AdapterError(
                        f"{self.name}: call {index}, made again {'whole' if self.chain is None else 'block by block'},"
                        f" differs by {off:.3g} from what was recorded (largest value {largest:.3g}); the module has"
                        " other weights than it had, draws random numbers, or changes while it runs"
                    )
