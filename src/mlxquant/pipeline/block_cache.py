"""What blocks write on real trajectories, so that each can be reconstructed without running the full-precision model
beside it.

A folder of ``samples/IIII_SSS.npz`` under ``metadata.json``, in float16: of every block's output a few tokens. Inputs
are not kept and neither is the text conditioning: that was 430 MB a sample. The first block's input follows from the
trajectory and its prompt, which the folder points to, and a later block's from the blocks before it, quantized as they
then are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..calibration.passes import Passes
from ..errors import ArtifactError
from ..files import schema
from ..files.checked import understood
from ..models.diffusion import DiffusionAdapter
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from ..sampling.guidance import FACTS, Guidance, sides
from ..sampling.prompts import LARGEST_SEED
from ..sweep.streams import ExactStream
from .ledger import Ledger
from .samples import MANIFEST, Samples, check_source, sample_name

KIND = "adaround-cache"
METADATA = "metadata.json"
COMMAND = "mlxquant cache-adaround-data"

STRUCTURE = schema.every(
    schema.entries(
        {
            "model": schema.text,
            "source": schema.text,
            "parents": schema.entries({MANIFEST: schema.text}),
            "blocks": schema.array_of(schema.text, 1),
            "sigmas": schema.array_of(schema.number(0), 1),
            "tokens": schema.table_of(schema.array_of(schema.whole(1, schema.WIDTH), 2, 2), 1),
            "num_images": schema.whole(1),
            "stride": schema.whole(1),
            "seed": schema.whole(0, LARGEST_SEED),
        }
    ),
    FACTS,
)
TOKENS = "tokens/"  # before a stream's name: which of its tokens are kept


@dataclass(frozen=True)
class BlockCache:
    """A folder of block outputs. ``calibration`` is the sha256 of the manifest whose trajectories were replayed,
    ``blocks`` the stage names in order, ``sigmas`` the noise levels kept, descending, and ``tokens`` how many tokens
    are kept of how many, by stream; which ones differs from sample to sample, so that together they see every place.
    """

    ledger: Ledger
    model: str
    source: str
    calibration: str
    sha256: str
    blocks: tuple[str, ...]
    sigmas: tuple[float, ...]
    tokens: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path, *, complete: bool = True) -> BlockCache:
        """Raises ArtifactError when there is no cache, a damaged or foreign one, or, unless ``complete`` is False, an
        unfinished one.
        """
        ledger = Ledger.read(folder / METADATA, KIND, f"run '{COMMAND}' first", STRUCTURE)
        if complete:
            ledger.require_complete(COMMAND)
        facts = ledger.facts
        tokens = {stream: (kept, length) for stream, (kept, length) in facts["tokens"].items()}
        parent, blocks, sigmas = facts["parents"][MANIFEST], tuple(facts["blocks"]), tuple(facts["sigmas"])
        return cls(ledger, facts["model"], facts["source"], parent, ledger.sha256, blocks, sigmas, tokens)

    def check(self, adapter: DiffusionAdapter) -> None:
        """Raise CalibrationError when the cache was made with other weights than the adapter's."""
        check_source(f"{self.ledger.path}: the blocks' outputs", self.model, self.source, adapter)

    def inputs(
        self, adapter: DiffusionAdapter, calib_dir: Path | None = None, size: int | None = None
    ) -> tuple[list[float], list[State]]:
        """Noise levels, descending, and at each the first block's input, float32, ``size`` images in a state (None: all
        of them), every image's rows (guided, unguided) in turn.

        Beside it, under ``tokens/STREAM`` [rows, kept], which tokens of a stream there are targets for; blocks pass
        that on. Computed from the trajectories, which are in ``calib_dir``, by default the folder around the cache's.
        Raises ArtifactError when they are not there or are others.
        """
        folder = self.ledger.folder.absolute().parent if calib_dir is None else calib_dir
        if not (folder / MANIFEST).exists():
            raise ArtifactError(f"{folder}: holds no {MANIFEST}; pass the folder of the trajectories with --calib-dir")
        samples = Samples.read(folder)
        if samples.sha256 != self.calibration:
            raise ArtifactError(
                f"{folder}: its trajectories are not those that {self.ledger.folder} was made from (manifest"
                f" {samples.sha256[:12]}…, expected {self.calibration[:12]}…); pass the right --calib-dir or make the"
                " cache anew"
            )
        images, stride = self.ledger.facts["num_images"], self.ledger.facts["stride"]
        sigmas, states = samples.calibration(images, stride).in_order(adapter, size)
        first = Passes(adapter, sigmas).through(adapter.stages[0], states)
        rows = len(sides(Guidance.of(self.ledger.facts)))
        for state, (index, some) in zip(first, self._batches(size), strict=True):
            for stream, tokens in chosen(self.tokens, self.ledger.facts["seed"], some, index * stride).items():
                state[TOKENS + stream] = mx.repeat(tokens, rows, axis=0)
        return sigmas, first

    def _batches(self, size: int | None) -> list[tuple[int, range]]:
        """Which noise level and which images each state is of, with ``size`` images in each."""
        images = self.ledger.facts["num_images"]
        size = images if size is None else size
        starts = range(0, images, size)
        return [
            (index, range(start, min(start + size, images))) for index in range(len(self.sigmas)) for start in starts
        ]

    def targets(self, block: int, size: int | None = None) -> list[State]:
        """What a block writes at the tokens kept, [rows, kept, ...] float32, for the same noise levels and rows as
        ``inputs``.
        """
        if not 0 <= block < len(self.blocks):
            raise ArtifactError(f"{self.ledger.path}: no block {block}; it has blocks 0 to {len(self.blocks) - 1}")
        prefix = f"mm{block}__"
        stride, states = self.ledger.facts["stride"], []
        for index, images in self._batches(size):
            with understood(self.ledger.path, f"run '{COMMAND} --force'"):
                parts = [self.ledger.arrays(sample_name(image, index * stride), prefix) for image in images]
                stacked = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            states.append(
                {name.removeprefix(prefix): mx.array(value.astype(np.float32)) for name, value in stacked.items()}
            )
        return states


def kept_tokens(length: int, tokens: int | None) -> int:
    """How many of a stream's tokens are kept; see ``plan`` for ``tokens``."""
    return length if tokens == 0 else min(length, max(4, length // 8) if tokens is None else tokens)


def draw_tokens(counts: Mapping[str, Sequence[int]], seed: int, image: int, step: int) -> dict[str, Array]:
    """Which tokens to keep of a sample's streams, of ``counts`` (kept, of how many): sorted, distinct, equally likely,
    int32.
    """
    rng = np.random.default_rng([seed, image, step])
    return {
        name: np.sort(rng.choice(length, kept, replace=False)).astype(np.int32)
        for name, (kept, length) in sorted(counts.items())
    }


def chosen(counts: Mapping[str, Sequence[int]], seed: int, images: range, step: int) -> dict[str, mx.array]:
    """Which tokens to keep of some images at a step, [images, kept] by stream."""
    drawn = [draw_tokens(counts, seed, image, step) for image in images]
    return {stream: mx.array(np.stack([some[stream] for some in drawn])) for stream in counts}


def pick(values: mx.array, tokens: mx.array) -> mx.array:
    """Of values [B,N,...] the tokens [B,kept] of each row."""
    return mx.take_along_axis(values, tokens.reshape(*tokens.shape, *(1,) * (values.ndim - 2)), axis=1)


class CachedTeacher:
    """The teacher of a sweep that reads what blocks write from a cache, at the tokens that were kept.

    With ``both`` it also runs the full-precision blocks, for ``inputs``: a cache holds those of the first block
    alone. A batch has as many images as the adapter samples at once.
    """

    def __init__(self, cache: BlockCache, passes: Passes, states: list[State], both: bool):
        self._cache, self._size = cache, passes.adapter.batch
        self._exact = ExactStream(passes, states) if both else None

    def targets(self, stage: Stage) -> list[State]:
        if self._exact is not None:
            self._exact.targets(stage)
        return self._cache.targets(self._cache.blocks.index(stage.name), self._size)

    def inputs(self) -> Sequence[State]:
        assert self._exact is not None
        return self._exact.inputs()

    def pick(self, outputs: State) -> State:
        return {key: pick(value, outputs[TOKENS + key]) for key, value in outputs.items() if TOKENS + key in outputs}
