"""One layer, one weight method: how much output error is left, on calibration and on held-out tokens, and in how many seconds.

    python benchmarks/layer_methods.py --data layer --method gptq --steps search --bits 4 --group-size -1

Without ``--w`` and ``--x`` it runs on the benchmark layer, which it draws from a seed: 1536x1536 Student-t weights and 2048 correlated
tokens with 8 outlier channels, and as many held-out tokens. The last line on stdout is one JSON object. Group size -1 is one
symmetric step a row; 32, 64 and 128 are asymmetric groups.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from mlxquant.errors import MlxQuantError, NumericsError
from mlxquant.formats import WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.moments import Moments

Array = npt.NDArray[Any]
Path_ = click.Path(path_type=Path, dir_okay=False)


def round_symmetric(values: Array, bits: int, axis: int) -> Array:
    """Rounded to nearest with one step absmax / (2^(bits-1) - 1) along ``axis``."""
    top = 2 ** (bits - 1) - 1
    step = np.abs(values).max(axis=axis, keepdims=True) / top
    return np.clip(np.round(values / step), -top - 1, top) * step


def benchmark_layer(width: int = 1536, tokens: int = 2048, seed: int = 0) -> dict[str, Array]:
    """W [width,width]; X, X_test [tokens,width] of the full-precision model; X_quant, X_test_quant the same tokens out of a layer
    with 8-bit activations and 4-bit weights. All float32.

    The inputs are white noise through a matrix with power-law singular values, 8 of whose columns are 20 times larger.
    """
    random = np.random.default_rng(seed)
    weight = 0.02 * random.standard_t(5, size=(width, width)) / np.sqrt(5 / 3)
    left, right = (np.linalg.qr(random.standard_normal((width, width)))[0] for _ in range(2))
    spectrum = (1.0 + np.arange(width)) ** -0.5
    spectrum *= np.sqrt(width / np.sum(spectrum**2))
    mixing = (left * spectrum) @ right
    mixing[:, random.choice(width, 8, replace=False)] *= 20.0
    noise, test_noise = random.standard_normal((tokens, width)), random.standard_normal((tokens, width))
    quantized = round_symmetric(mixing, 4, axis=0)
    arrays = {
        "W": weight,
        "X": noise @ mixing,
        "X_quant": round_symmetric(noise, 8, axis=1) @ quantized,
        "X_test": test_noise @ mixing,
        "X_test_quant": round_symmetric(test_noise, 8, axis=1) @ quantized,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def save(path: Path, array: Array) -> None:
    """Write under a temporary name first, so that a file of this name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error


def load(path: Path, width: int | None = None) -> Array:
    """A finite float matrix [n,width] from an npy file."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise click.ClickException(f"cannot read {path}: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise click.ClickException(f"{path}: found {found}, expected a matrix of floats")
    if width is not None and array.shape[1] != width:
        raise click.ClickException(f"{path}: found {array.shape[1]} columns, expected {width}, the input width of the weight")
    if not np.isfinite(array).all():
        raise NumericsError(f"{path}: holds NaN or infinite values")
    return array.astype(np.float32, copy=False)


def load_tokens(file: Path, quantized_file: Path | None, width: int) -> tuple[Array, Array]:
    """The same tokens [n,width] as the full-precision model and as the quantized model sees them."""
    inputs = load(file, width)
    seen = load(quantized_file, width) if quantized_file else inputs
    if len(seen) != len(inputs):
        raise click.ClickException(f"{quantized_file}: found {len(seen)} tokens, expected the {len(inputs)} of {file}")
    return inputs, seen


def generated(folder: Path) -> dict[str, Path]:
    """The files of the benchmark layer in ``folder``, drawn now if one is missing."""
    names = ("W", "X", "X_quant", "X_test", "X_test_quant")
    files = {name: folder / f"{name}.npy" for name in names}
    if not all(file.exists() for file in files.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"cannot create {folder}: {error.strerror}") from error
        for name, array in benchmark_layer().items():
            save(files[name], array)
    return files


def relative_error(weight: Array, inputs: Array, quantized: Array, quantized_inputs: Array) -> float:
    """‖XWᵀ − X~Qᵀ‖ / ‖XWᵀ‖ in float64."""
    output = inputs.astype(np.float64) @ weight.T.astype(np.float64)
    change = output - quantized_inputs.astype(np.float64) @ quantized.T.astype(np.float64)
    if not output.any():
        raise click.ClickException("the layer's output is zero: an error relative to it means nothing")
    return float(np.linalg.norm(change) / np.linalg.norm(output))


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "cores": os.cpu_count(), "numpy": np.__version__, "python": platform.python_version()}


@click.command(help=__doc__)
@click.option("--w", "weight_file", type=Path_, help="Weight [out,in], npy.")
@click.option("--x", "inputs_file", type=Path_, help="Calibration inputs [n,in], npy.")
@click.option("--xq", "quantized_inputs_file", type=Path_, help="The same tokens as the quantized model sees them; moments are of these.")
@click.option("--xtest", "test_file", type=Path_, help="Held-out inputs [n,in], npy.")
@click.option("--xtestq", "quantized_test_file", type=Path_, help="The held-out tokens as the quantized model sees them.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Folder of the drawn layer.  [default: in the temporary folder]"
)
@click.option("--method", default="gptq", show_default=True, help="Rounding method.")
@click.option("--steps", default="search", show_default=True, help="How the grid is chosen.")
@click.option("--bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--group-size", default=-1, show_default=True, type=click.Choice([-1, 32, 64, 128]))
@click.option("--damping", type=click.FloatRange(0), help="Relative to the mean of the Hessian's diagonal.  [default: the method's]")
@click.option("--out", type=Path_, help="Write the dequantized weight here, float32 npy.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1), help="Time this many runs; the median is reported.")
def main(
    weight_file: Path | None,
    inputs_file: Path | None,
    quantized_inputs_file: Path | None,
    test_file: Path | None,
    quantized_test_file: Path | None,
    data: Path | None,
    method: str,
    steps: str,
    bits: int,
    group_size: int,
    damping: float | None,
    out: Path | None,
    repeat: int,
) -> None:
    if (weight_file is None) != (inputs_file is None):
        raise click.UsageError("--w and --x go together")
    if quantized_test_file is not None and weight_file is not None and test_file is None:
        raise click.UsageError("--xtestq needs --xtest")
    try:
        find_grid = registry.get("steps", steps).function
        find_codes = registry.get("round", method).function
        if weight_file is None or inputs_file is None:
            files = generated(data or Path(tempfile.gettempdir()) / "mlxquant-layer")
            weight_file, inputs_file, test_file = files["W"], files["X"], test_file or files["X_test"]
        weight = load(weight_file)
        inputs, seen = load_tokens(inputs_file, quantized_inputs_file, weight.shape[1])
        held_out = load_tokens(test_file, quantized_test_file, weight.shape[1]) if test_file else None

        started = time.perf_counter()
        moments = Moments.of(seen)
        seconds_gram = time.perf_counter() - started
        format = WeightFormat(bits, "channel" if group_size == -1 else group_size, symmetric=group_size == -1)
        options = {} if damping is None or method == "rtn" else {"damping": damping}
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            grid = find_grid(weight, format, moments)
            codes = find_codes(weight, grid, moments, **options)
            seconds.append(time.perf_counter() - started)
    except MlxQuantError as error:
        raise click.ClickException(str(error)) from error

    quantized = grid.dequantize(codes)
    if out is not None:
        save(out, quantized)
    report = {
        "method": method,
        "steps": steps,
        "bits": bits,
        "group_size": group_size,
        "damping": damping,
        "shape": list(weight.shape),
        "seconds": float(np.median(seconds)),
        "seconds_gram": seconds_gram,
        "seconds_are": "steps and rounding, median of --repeat; the gram matrix apart",
        "rel_error": relative_error(weight, inputs, quantized, seen),
        "machine": machine(),
    }
    if held_out is not None:
        report["rel_error_heldout"] = relative_error(weight, held_out[0], quantized, held_out[1])
    click.echo(json.dumps(report, sort_keys=True))


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as problem:
        click.echo(f"Error: {problem.format_message()}", err=True)
        sys.exit(problem.exit_code)
