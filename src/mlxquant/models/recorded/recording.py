"""Keep what a module was called with, in anybody's pipeline: ``recording``.

Of each call the arguments and the result are kept: arrays as they were (whatever the module or its caller does to them
afterwards), anything else by reference. Where there are more calls than wanted, a sample of them stays in which every
call has the same chance, so that all steps and prompts of a pipeline are in it; which ones is decided by a fixed seed.
Arrays past a limit of memory lie in a folder of safetensors files.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import ArtifactError, CalibrationError
from ...files import checked
from ...files.checked import array_digest, read_tensors, write_tensors
from ...layers.tree import module_of
from .trees import Leaf, arrays, as_it_is, held_arrays, leaves, mapped, told
from .trees import Path as TreePath
from .watching import uncompiled, watched

SAMPLES = 128  # calls, where nobody says
MEMORY = 2.0  # GB of arrays, before they go to disk
KIND = "recorded-call"


class Call:
    """One call of a module. Arrays that lie on disk are read when they are asked for.

    Args:
        make: Gives the arguments, those by name, and the result.
    """

    def __init__(self, make: Callable[[], tuple[tuple[Any, ...], dict[str, Any], Any]]):
        self._make = make

    @cached_property
    def _made(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        return self._make()

    @property
    def args(self) -> tuple[Any, ...]:
        """What the module was called with."""
        return self._made[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """What it was called with by name."""
        return self._made[1]

    @cached_property
    def arrays(self) -> dict[TreePath, mx.array]:
        """The arrays in what it was called with, by their path in (args, kwargs)."""
        return arrays((self.args, self.kwargs))

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it was called with, in arrays of its own every time, which whoever is given them may write into."""
        args, kwargs = mapped((self.args, self.kwargs), lambda path, leaf: as_it_is(leaf))
        return args, kwargs

    def again(self, module: nn.Module) -> Any:
        """Call a module in the same way."""
        args, kwargs = self.given()
        return module(*args, **kwargs)

    @property
    def result(self) -> Any:
        """What it returned."""
        return self._made[2]


@dataclass
class _Kept:
    """A call whose arrays are in ``values`` or, by name, in ``file``; ``tree`` has numbers in their places."""

    number: int
    tree: Any
    values: list[mx.array]
    digest: str
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)


@dataclass(frozen=True)
class _Slot(Leaf):
    """Stands for an array in a tree."""

    index: int


class Recording:
    """Calls of one module, in the order in which they were made; ``recording`` makes one.

    Attributes:
        module: The module that was called.
        seen: How many calls there were, kept or not.
        going_on: Whether calls are still being recorded.
    """

    def __init__(self, module: nn.Module, samples: int, memory: float, folder: Path | None):
        self.module, self.seen, self.going_on = module, 0, False
        self._samples, self._limit = samples, int(memory * 1e9)
        self._folder = folder
        self._kept: list[_Kept] = []
        self._random = np.random.default_rng(0)
        self._in_memory = 0

    def __len__(self) -> int:
        """How many calls are kept."""
        return len(self._kept)

    def __getitem__(self, index: int) -> Call:
        """A kept call. Its arrays are objects of its own, and read again where they are on disk."""
        kept = self._kept[index]

        def make() -> Any:
            values = kept.values
            if kept.file is not None:
                found, _ = read_tensors(kept.file, KIND)
                values = [found[f"{place:04d}"] for place in range(len(found))]
            return mapped(
                kept.tree, lambda path, leaf: copy.copy(values[leaf.index]) if isinstance(leaf, _Slot) else leaf
            )

        return Call(make)

    def answered_anew(self) -> Recording:
        """The same calls with what the module returns now: for calls that it was given while it was quantized, once it
        is in full precision again.
        """
        other = Recording(self.module, self._samples, self._limit / 1e9, None)
        for index in range(len(self)):
            other.keep(*self[index].given(), self[index].again(self.module))
        return other

    @property
    def record(self) -> dict[str, Any]:
        """All that a calibration with these calls depends on, as plain data."""
        digests = [kept.digest for kept in self._kept]
        return {"calls": len(self), "of": self.seen, "digest": checked.digest(digests)}

    @property
    def on_disk(self) -> int:
        """How many calls have their arrays in files."""
        return sum(kept.file is not None for kept in self._kept)

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep a call, or not; see above which ones.

        Args:
            args: What the module was called with.
            kwargs: What it was called with by name.
            result: What it returned.

        Raises:
            CalibrationError: The result holds no array, or one that is not finite; or arrays have no values yet, since
                the call is being traced.
        """
        place, self.seen = self.seen, self.seen + 1
        if place >= self._samples:  # reservoir sampling (Vitter 1985, algorithm R)
            place = int(self._random.integers(self.seen))
            if place >= self._samples:
                return
        kept = self._taken(args, kwargs, result)
        if place < len(self._kept):
            self._forget(self._kept.pop(place))
        self._kept.append(kept)  # in order: of the calls that are kept, it is the latest
        self._in_memory += kept.nbytes
        if self._in_memory > self._limit:
            self._write(kept)

    def _taken(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Kept:
        values: list[mx.array] = []

        def take(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, mx.array):
                return leaf
            values.append(mx.array(leaf))  # another object: the caller may write into its own
            return _Slot(len(values) - 1)

        tree = mapped((args, kwargs, result), take)
        where = f"call {self.seen - 1} of {type(self.module).__name__}"
        try:
            mx.eval(values)
        except (ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"{where}: its arrays have no values ({error}); record outside of mx.vmap and of functions that are"
                " being compiled"
            ) from error
        wrote = [value for value in arrays(result).values() if mx.issubdtype(value.dtype, mx.floating) and value.size]
        if not wrote:
            raise CalibrationError(
                f"{where}: it returned a {type(result).__name__} without numbers in arrays of floats, so there is"
                " nothing to compare with"
            )
        if not all(bool(mx.isfinite(value).all().item()) for value in wrote):
            raise CalibrationError(f"{where}: it returned NaN or infinite values; mend the model or its inputs")
        digest = checked.digest([array_digest(value) for value in values])
        return _Kept(self.seen - 1, tree, values, digest)

    def _write(self, kept: _Kept) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mlxquant-recording-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{kept.number:06d}.safetensors"
        if file.exists():
            raise ArtifactError(f"{file}: another recording's; choose a folder for this one alone, or empty that")
        write_tensors(file, KIND, {f"{place:04d}": value for place, value in enumerate(kept.values)}, {})
        self._in_memory -= kept.nbytes
        kept.values, kept.file = [], file

    def _forget(self, kept: _Kept) -> None:
        self._in_memory -= kept.nbytes
        if kept.file is not None:
            kept.file.unlink(missing_ok=True)


@contextmanager
def recording(
    module: nn.Module, samples: int = SAMPLES, memory: float = MEMORY, folder: str | Path | None = None
) -> Iterator[Recording]:
    """Keep what a module is called with inside, by whatever pipeline it is in: what ``quantize_module`` runs it on.

    ``mx.compile`` is off inside, so that calls from compiled functions are seen, too. The module works as ever.

    Args:
        module: Any module of MLX. Its own calls are kept, not those of modules in it.
        samples: How many calls at most; of more, each has the same chance to be kept.
        memory: GB of arrays that are kept in memory; the others go to disk.
        folder: Where to; None for a temporary folder, which goes with the recording.

    Returns:
        The recording, which fills while the module is called.

    Raises:
        AdapterError: What is given is no module.
        CalibrationError: A limit is below 1 call or 0 GB; inside, a call that cannot be kept. It says which and why.
        ArtifactError: ``folder`` cannot be written, or holds another recording's calls.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> import mlxquant as mq
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = [nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)) for _ in range(2)]
        ...     def __call__(self, x):
        ...         for block in self.blocks:
        ...             x = x + block(x)
        ...         return x
        >>> net = Net()
        >>> with mq.recording(net) as seen:
        ...     for seed in range(4):
        ...         y = net(mx.random.normal((2, 5, 8), key=mx.random.key(seed)))
        >>> len(seen)
        4
    """
    module = module_of(module)
    if samples < 1 or not memory >= 0:
        raise CalibrationError(f"a recording of {samples} calls in {memory} GB; expected at least 1 call and 0 GB")
    seen = Recording(module, samples, memory, None if folder is None else Path(folder))

    def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> Any:
        before_it = Call(lambda: (args, kwargs, None)).given()  # for the module may write into its arguments
        others = {
            path: (leaf, held_arrays(leaf)) for path, leaf in leaves((args, kwargs)) if not isinstance(leaf, mx.array)
        }
        result = run()
        for path, (leaf, before) in others.items():
            after = held_arrays(leaf)
            if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                raise CalibrationError(
                    f"call {seen.seen} of {type(module).__name__}: its argument {told(path)}, a {type(leaf).__name__},"
                    " is changed by the call (a cache of keys and values, say), so the call cannot be made again;"
                    " record calls without it"
                )
        seen.keep(*before_it, result)
        return result

    with uncompiled(), watched({"module": module}, answer):
        seen.going_on = True
        try:
            yield seen
        finally:
            seen.going_on = False
