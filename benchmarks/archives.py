"""What an archive of a folder takes, beside general compressors: ``python benchmarks/archives.py FOLDER…``.

Without folders it packs those that it makes of one random layer, 20 million Gaussian weights on grids that were
searched for them, as ``mlxquant export --target mlx-lm`` lays a layer out. A table of bytes saved and of CPU seconds a
GB: the archive, ``zip`` at its best and, where ``zstandard`` is installed, zstd at levels 3 and 19. That the folder
comes back is checked. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant  # noqa: F401  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

from mlxquant.commandline.console import result, say
from mlxquant.exporters.archive import unpack_archive, write_archive
from mlxquant.exporters.record import write_record
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.plain import plain_layer
from mlxquant.methods import registry
from mlxquant.numerics.moments import Moments

SHAPE = (4096, 4864)  # 20 million
FORMATS = ("w4", "w4-g64", "w3", "w3-g64", "w2-g64")


def random_folder(place: Path, text: str) -> Path:
    """A folder with the layer in a format, as other tools read it."""
    format, folder = WeightFormat.parse(text), place / text
    weight = np.random.default_rng(0).standard_normal(SHAPE, np.float32) * 0.02
    grid = registry.get("steps", "search").function(weight, format, Moments.identity(SHAPE[1]))
    plain = plain_layer(QuantizedLinear(grid.quantize(weight), grid))
    folder.mkdir()
    arrays = {f"layer.{name}": value for name, value in plain.arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({"quantization": {**plain.setting, "layer": plain.setting}}))
    write_record(folder, {"target": "mlx-lm"}, {"layer": plain.setting})
    return folder


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def zipped(files: list[Path]) -> int:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in files:
            archive.write(path, path.name)
    return len(buffer.getvalue())


def compressors(files: list[Path]) -> Iterator[tuple[str, Callable[[], int]]]:
    """By name what gives the bytes that files take."""
    yield "zip -9", lambda: zipped(files)
    try:
        import zstandard
    except ImportError:
        return
    for level in (3, 19):
        one = zstandard.ZstdCompressor(level)
        yield f"zstd -{level}", lambda one=one: sum(len(one.compress(path.read_bytes())) for path in files)


def measured(folder: Path, place: Path) -> dict[str, Any]:
    """Bytes of a folder, which share of them each saves, and CPU seconds a GB of the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    file, again = place / "a.tar.gz", place / "again"
    facts, packing = timed(lambda: write_archive(folder, file))
    _, unpacking = timed(lambda: unpack_archive(file, again))
    assert all((again / path.relative_to(folder)).read_bytes() == path.read_bytes() for path in files)
    row = {"bytes": size, "archive": 1 - facts["bytes"] / size}
    row |= {"packing s/GB": 1e9 * packing / size, "unpacking s/GB": 1e9 * unpacking / size}
    for name, compressed in compressors(files):
        bytes_, seconds = timed(compressed)
        row |= {name: 1 - bytes_ / size, f"{name} s/GB": 1e9 * seconds / size}
    return row


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folders: tuple[Path, ...]) -> None:
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for folder in folders or (random_folder(place, text) for text in FORMATS):
            rows[folder.name] = measured(folder, Path(tempfile.mkdtemp(dir=place)))
            cells = [
                f"{v:.1%}" if v < 1 else f"{v:.1f}" if v < 1e4 else f"{v / 1e6:.2f} MB"
                for v in rows[folder.name].values()
            ]
            say(f"| {folder.name} | {' | '.join(cells)} |")
    say(f"| folder | {' | '.join(rows[folder.name])} |")
    result({"rows": rows})


if __name__ == "__main__":
    main()
