"""Whether a model is quantized in little more memory than its weights: ``python benchmarks/mflux_memory.py``.

Writes a transformer of mflux's Z-Image class with random weights (by default 2 GB in float32, which a CPU computes in)
to a temporary folder, loads it as mflux does, so that weights are read when they are first needed, records two calls,
and quantizes it as ``mlxquant quantize`` does with pipelines: each layer goes as soon as another stands in its place.
Reports the resident memory of the process before the weights are read, with them, at its peak, and at the end. The last
line on stdout is one JSON object. Needs mflux: ``pip install --no-deps mflux==0.24.0``.
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import click

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mlx.utils import tree_flatten

from mlxquant.commandline.console import peak_bytes, progress, result, say
from mlxquant.models.mflux.families import host_of

HEADS, TEXT, SIDE = 12, 256, 16  # a picture of SIDE x SIDE latents


def built(width: int, depth: int) -> ZImageTransformer:
    """The transformer, with arrays that nobody has asked for yet."""
    head = width // HEADS
    axes = [head - 2 * (head // 4 // 2 * 2), head // 4 // 2 * 2, head // 4 // 2 * 2]
    return ZImageTransformer(
        dim=width, n_layers=depth, n_refiner_layers=1, n_heads=HEADS, cap_feat_dim=TEXT, axes_dims=axes
    )


def written(folder: Path, width: int, depth: int) -> int:
    """Write random weights, a tensor a file, and return their bytes: no more of them are in memory at once."""
    mx.random.seed(0)
    total = 0
    for index, (name, value) in enumerate(tree_flatten(built(width, depth).parameters())):
        mx.save_safetensors(str(folder / f"{index}.safetensors"), {name: value})
        total += value.nbytes
    return total


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def call(model: ZImageTransformer, seed: int) -> mx.array:
    """What it returns for noise, at one step of two."""
    keys = mx.random.split(mx.random.key(seed), 2)
    latents = mx.random.normal((16, 1, SIDE, SIDE), key=keys[0])
    text = mx.random.normal((32, TEXT), key=keys[1])
    wrote = model(x=latents, timestep=seed % 2, sigmas=mx.array([1.0, 0.5, 0.0]), cap_feats=text)
    mx.eval(wrote)
    return wrote


@click.command(help=__doc__)
@click.option("--width", default=1536, show_default=True, help="Channels, a multiple of 192.")
@click.option("--depth", default=16, show_default=True, help="Blocks.")
@click.option("--recipe", default="gptq-w4a16-g64-bf16", show_default=True)
def main(width: int, depth: int, recipe: str) -> None:
    ModelConfig.precision = mx.float32
    with tempfile.TemporaryDirectory() as place:
        nbytes = written(Path(place), width, depth)
        model = built(width, depth)
        arrays: dict[str, Any] = {}
        for path in Path(place).glob("*.safetensors"):
            arrays |= mx.load(str(path))  # type: ignore[arg-type]
        model.load_weights(list(arrays.items()))
        del arrays
        start = resident()
        with mq.recording(model) as seen:
            for seed in range(2):
                call(model, seed)
        loaded = resident()
        began = time.perf_counter()
        host = host_of(model)
        mq.quantize_module(model, seen, recipe, time=host.time, edges=host.edges, restores=False, progress=progress)
        seconds, peak, end = time.perf_counter() - began, peak_bytes(), resident()
    over = (peak - start) / nbytes - 1
    say(f"weights {nbytes / 1e9:.2f} GB; resident {start / 1e9:.2f} before, {loaded / 1e9:.2f} with them,")
    say(f"{peak / 1e9:.2f} at the peak, {end / 1e9:.2f} at the end: {over:+.1%} of the weights; {seconds:.0f} s")
    facts = {"weights": nbytes, "start": start, "loaded": loaded, "peak": peak, "end": end, "over": over}
    result({**facts, "recipe": recipe, "seconds": seconds, "platform": platform.platform()})


if __name__ == "__main__":
    main()
