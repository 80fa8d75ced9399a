"""One layer, one weight method: how much output error is left, on calibration and on held-out tokens, and in how many
seconds.

    python benchmarks/layer_methods.py --data layer --method gptq --steps search --bits 4 --group-size -1

Without ``--w`` and ``--x`` it runs on the benchmark layer, which it draws from a seed: 1536x1536 Student-t weights and
2048 correlated tokens with 8 outlier channels, and as many held-out tokens. With ``--two-inputs`` the quantized model
sees those tokens as they come out of a layer with 8-bit activations and 4-bit weights, and errors are against the exact
output. The last line on stdout is one JSON object. Group size -1 is one symmetric step a row; 32, 64 and 128 are
asymmetric groups. ``--growth`` times layers of several widths.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from mlxquant.errors import MlxQuantError, NumericsError
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.weights.correction import corrected_target
from mlxquant.methods.weights.damping import TARGETS, choose_damping
from mlxquant.numerics.moments import Moments

Array = npt.NDArray[Any]
WIDTHS = (768, 1536, 3072, 6144)  # of --growth
HELD_OUT = 4  # with --held-out one calibration token in so many
Path_ = click.Path(path_type=Path, dir_okay=False)


def round_symmetric(values: Array, bits: int, axis: int) -> Array:
    """Rounded to nearest with one step absmax / (2^(bits-1) - 1) along ``axis``."""
    top = 2 ** (bits - 1) - 1
    step = np.abs(values).max(axis=axis, keepdims=True) / top
    return np.clip(np.round(values / step), -top - 1, top) * step


def benchmark_layer(width: int = 1536, tokens: int = 2048, seed: int = 0) -> dict[str, Array]:
    """W [width,width]; X, X_test [tokens,width] of the full-precision model; X_quant, X_test_quant the same tokens out
    of a layer with 8-bit activations and 4-bit weights. All float32.

    The inputs are white noise through a matrix with power-law singular values, 8 of whose columns are 20 times larger.
    """
    random = np.random.default_rng(seed)
    weight = 0.02 * random.standard_t(5, size=(width, width)) / np.sqrt(5 / 3)
    left, right = (np.linalg.qr(random.standard_normal((width, width)))[0] for _ in range(2))
    spectrum = (1.0 + np.arange(width)) ** -0.5
    spectrum *= np.sqrt(width / np.sum(spectrum**2))
    mixing = (left * spectrum) @ right
    mixing[:, random.choice(width, 8, replace=False)] *= 20.0
    quantized = round_symmetric(mixing, 4, axis=0)
    arrays = {"W": weight.astype(np.float32)}
    for name in ("X", "X_test"):
        noise = random.standard_normal((tokens, width))
        arrays[name] = (noise @ mixing).astype(np.float32)
        arrays[f"{name}_quant"] = (round_symmetric(noise, 8, axis=1) @ quantized).astype(np.float32)
    return arrays


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
        raise click.ClickException(
            f"{path}: found {array.shape[1]} columns, expected {width}, the input width of the weight"
        )
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


def generated(folder: Path, width: int, tokens: int) -> dict[str, Path]:
    """The files of the benchmark layer in ``folder``, drawn now if one is missing."""
    names = ("W", "X", "X_quant", "X_test", "X_test_quant")
    folder = folder / f"{width}-inputs-{tokens}-tokens"
    files = {name: folder / f"{name}.npy" for name in names}
    if not all(file.exists() for file in files.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"cannot create {folder}: {error.strerror}") from error
        for name, array in benchmark_layer(width, tokens).items():
            save(files[name], array)
    return files


@dataclass(frozen=True)
class Plan:
    """How a weight is quantized: the format, how steps and codes are found, whether they aim at the corrected target,
    whether both are refined at the end.
    """

    format: WeightFormat
    steps: str
    method: str
    corrected: bool = False
    refine: bool = False

    def run(
        self, weight: Array, moments: Moments, damping: float | None = None, aim: float = 1e-3
    ) -> tuple[Grid, Array]:
        """Grid and codes; ``damping`` of the rounding (None: the method's own) and of the target that it
        ``aim``s at.
        """
        options = {} if damping is None or self.method == "rtn" else {"damping": damping}
        target = corrected_target(weight, moments, aim) if self.corrected else weight
        grid = registry.get("steps", self.steps).function(target, self.format, moments)
        codes = registry.get("round", self.method).function(target, grid, moments, **options)
        if self.refine:
            grid, codes = registry.get("refine", "refit").function(target, grid, codes, moments, **options)
        return grid, codes

    def dampings(self, weight: Array, moments: Moments) -> dict[str, float]:
        """Those of the target and of the rounding that do best on the tokens held out, chosen one after the other."""
        chosen: dict[str, float] = {}
        if self.corrected and (target := choose_damping(weight, corrected_target, moments, TARGETS)) is not None:
            chosen["aim"] = target.damping

        def rounded(rows: Array, training: Moments, damping: float) -> Array:
            grid, codes = self.run(rows, training, damping, **chosen)
            return grid.dequantize(codes)

        if (choice := choose_damping(weight, rounded, moments)) is not None:
            chosen["damping"] = choice.damping
        return chosen


def moments_of(seen: Array, exact: Array | None, hold_out: bool) -> Moments:
    """Of all tokens [n,in], every fourth of them apart as well where wanted; with the cross term where there are two
    streams.
    """
    moments = Moments.empty(seen.shape[1])
    held = np.arange(len(seen)) % HELD_OUT == HELD_OUT - 1 if hold_out else np.zeros(len(seen), bool)
    for some, held_out in ((~held, False), (held, True)):
        if some.any():
            moments.add(seen[some], None if exact is None else exact[some], held_out=held_out)
    return moments


def timed(work: Callable[[], Any], repeat: int) -> tuple[Any, list[float]]:
    """The last result and the seconds of each run."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, seconds


def growth(plan: Plan, repeat: int) -> dict[str, Any]:
    """Seconds of square layers over their width K, and the power of K by which they grow from each to the next: 3 is
    K³.

    The inputs are white noise with outlier channels, fewer than K: the time does not depend on them.
    """
    random, seconds = np.random.default_rng(0), []
    for width in WIDTHS:
        weight = random.standard_t(5, (width, width)).astype(np.float32) * np.float32(0.02)
        inputs = random.standard_normal((width // 4, width), np.float32)
        inputs[:, :8] *= 20
        exact = inputs * np.float32(0.9) if plan.corrected or registry.get("round", plan.method).cross else None
        moments = moments_of(inputs, exact, hold_out=False)
        seconds.append(min(timed(lambda w=weight, m=moments: plan.run(w, m), repeat)[1]))
        click.echo(f"width {width}: {seconds[-1]:.2f} s", err=True)
    powers = [float(np.log2(later / earlier)) for earlier, later in pairwise(seconds)]
    return {"widths": list(WIDTHS), "seconds": seconds, "powers": powers, "seconds_are": "the least of --repeat"}


def relative_error(weight: Array, inputs: Array, quantized: Array, quantized_inputs: Array) -> float:
    """‖XWᵀ − X~Qᵀ‖ / ‖XWᵀ‖ in float64."""
    output = inputs.astype(np.float64) @ weight.T.astype(np.float64)
    change = output - quantized_inputs.astype(np.float64) @ quantized.T.astype(np.float64)
    if not output.any():
        raise click.ClickException("the layer's output is zero: an error relative to it means nothing")
    return float(np.linalg.norm(change) / np.linalg.norm(output))


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@click.command(help=__doc__)
@click.option("--w", "weight_file", type=Path_, help="Weight [out,in], npy.")
@click.option("--x", "inputs_file", type=Path_, help="Calibration inputs [n,in], npy.")
@click.option(
    "--xq",
    "quantized_inputs_file",
    type=Path_,
    help="The same tokens as the quantized model sees them; moments are of these.",
)
@click.option("--xtest", "test_file", type=Path_, help="Held-out inputs [n,in], npy.")
@click.option(
    "--xtestq", "quantized_test_file", type=Path_, help="The held-out tokens as the quantized model sees them."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the drawn layer.  [default: in the temporary folder]",
)
@click.option("--method", default="gptq", show_default=True, help="Rounding method.")
@click.option("--steps", default="search", show_default=True, help="How the grid is chosen.")
@click.option("--bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--group-size", default=-1, show_default=True, type=click.Choice([-1, 32, 64, 128]))
@click.option(
    "--damping",
    type=click.FloatRange(0),
    help="Relative to the mean of the Hessian's diagonal.  [default: the method's]",
)
@click.option("--held-out", is_flag=True, help="Choose dampings on every fourth calibration token.")
@click.option(
    "--corrected", is_flag=True, help="Aim at the target that makes up for what the inputs have lost; needs two inputs."
)
@click.option("--refine", is_flag=True, help="Refit steps and codes by turns in the end.")
@click.option("--two-inputs", is_flag=True, help="The drawn layer's inputs come from a quantized layer.")
@click.option("--width", default=1536, show_default=True, type=click.IntRange(8), help="Of the drawn layer.")
@click.option("--tokens", default=2048, show_default=True, type=click.IntRange(1), help="Of the drawn layer.")
@click.option(
    "--growth", "grow", is_flag=True, help=f"Only time square layers of widths {', '.join(map(str, WIDTHS))}."
)
@click.option("--out", type=Path_, help="Write the dequantized weight here, float32 npy.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1), help="Time this many runs.")
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
    held_out: bool,
    corrected: bool,
    refine: bool,
    two_inputs: bool,
    width: int,
    tokens: int,
    grow: bool,
    out: Path | None,
    repeat: int,
) -> None:
    if (weight_file is None) != (inputs_file is None):
        raise click.UsageError("--w and --x go together")
    if quantized_test_file is not None and weight_file is not None and test_file is None:
        raise click.UsageError("--xtestq needs --xtest")
    if held_out and damping is not None:
        raise click.UsageError("--held-out chooses what --damping sets; give one of them")
    format = WeightFormat(bits, "channel" if group_size == -1 else group_size, symmetric=group_size == -1)
    plan = Plan(format, steps, method, corrected, refine)
    facts = {
        "method": method,
        "steps": steps,
        "bits": bits,
        "group_size": group_size,
        "corrected": corrected,
        "refine": refine,
    }
    try:
        if grow:
            click.echo(json.dumps({**facts, **growth(plan, repeat), "machine": machine()}, sort_keys=True))
            return
        if weight_file is None or inputs_file is None:
            files = generated(data or Path(tempfile.gettempdir()) / "mlxquant-layer", width, tokens)
            weight_file, inputs_file, test_file = files["W"], files["X"], test_file or files["X_test"]
            if two_inputs:
                quantized_inputs_file, quantized_test_file = files["X_quant"], files["X_test_quant"]
        weight = load(weight_file)
        inputs, seen = load_tokens(inputs_file, quantized_inputs_file, weight.shape[1])
        test = load_tokens(test_file, quantized_test_file, weight.shape[1]) if test_file else None

        exact = None if quantized_inputs_file is None else inputs
        moments, seconds_gram = timed(lambda: moments_of(seen, exact, held_out), 1)
        dampings, seconds_damping = timed(lambda: plan.dampings(weight, moments) if held_out else {}, 1)
        if damping is not None:
            dampings = {"damping": damping}
        (grid, codes), seconds = timed(lambda: plan.run(weight, moments, **dampings), repeat)
    except MlxQuantError as error:
        raise click.ClickException(str(error)) from error

    quantized = grid.dequantize(codes)
    if out is not None:
        save(out, quantized)
    report = {
        **facts,
        "damping": dampings.get("damping"),
        "damping_of_target": dampings.get("aim"),
        "shape": list(weight.shape),
        "tokens": len(inputs),
        "seconds": float(np.median(seconds)),
        "seconds_least": min(seconds),
        "seconds_gram": seconds_gram[0],
        "seconds_damping": seconds_damping[0],
        "seconds_are": "steps and rounding, median of --repeat; the gram matrix and the choice of dampings apart",
        "rel_error": relative_error(weight, inputs, quantized, seen),
        "machine": machine(),
    }
    if test is not None:
        report["rel_error_heldout"] = relative_error(weight, test[0], quantized, test[1])
    click.echo(json.dumps(report, sort_keys=True))


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as problem:
        click.echo(f"Error: {problem.format_message()}", err=True)
        sys.exit(problem.exit_code)
