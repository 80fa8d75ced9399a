"""One digest of every file that mlxquant writes: ``python benchmarks/golden.py --out digests.txt``.

Run it before and after a change that must change nothing, on one machine, and compare: ``--against digests.txt`` prints
what differs and exits with 1. The embedded models are quantized by every kind of method at tiny settings (two prompts,
four steps, a few short windows of text), and go through the six steps of the pipeline, SpinQuant, training with
quantization, evaluation, ``inspect`` and the exporters. So it is about bytes; whether they are good bytes is for the
tests and the other benchmarks.

It calls nothing but ``import mlxquant``, ``mlxquant.spin_quant.SpinQuant`` and the command line, so that modules can
move under it. An exporter to DiffusionKit is left out, which needs DiffusionKit and a checkpoint of SD3.

A line is ``CASE/PATH  SHA256``; ``CASE/stdout.json`` is the last line that the case's command printed. What differs
from run to run is taken out before anything is written or digested: the versions of mlxquant and MLX are pinned, so are
the clock and the gauge of MLX's memory, and of JSON and CSV files the keys and columns in ``VARYING`` do not count. One
thread computes, for the order of a sum decides which of two equally near codes a weight gets. The last line of stdout
is one JSON object.
"""

# ruff: noqa: E402  (threads, version and clock are set before anything is imported)
from __future__ import annotations

import os

for _library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"  # before numpy and MLX are imported
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

PINNED = "0"
_version, _ticks, _seconds = importlib.metadata.version, itertools.count(), time.perf_counter
importlib.metadata.version = lambda name: PINNED if name in ("mlxquant", "mlx") else _version(name)
time.perf_counter = lambda: float(next(_ticks))  # a second from call to call, so that a report shows the same seconds

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlxquant.spin_quant import SpinQuant

mx.get_peak_memory = lambda: 0
mx.get_active_memory = lambda: 0

VARYING = {
    *("seconds", "seconds_quantize", "latency_s", "latency_p95_s", "latency_ratio", "peak_bytes"),  # measured
    *("machine", "mlx", "mlxquant"),  # what it ran on
}
PROMPTS, STEPS = 2, 4
PICTURES = {  # one of every kind of format, transform, range, rounding and branch; those that learn are in LEARNED
    "rtn": "rtn-w4a8",
    "gptq": "gptq-w4a8",
    "group-static": "gptq-w4a8-g64-static",
    "asym-token": "gptq-w4a8-asym-token",
    "weights-only": "rtn+mse-w3a16-tensor",
    "qronos": "qronos-w4a6",
    "gptaq": "gptaq-w4a8",
    "rotated": "gptq+smoothquant+rotation-w4a4",
    "svd": "svdquant-w4a4",
    "whitened": "gptq+ptq4dit+whitened16-w4a8",
    "tdq": "rtn+tdq-w8a8",
    "logsnr": "gptq+logsnr-w4a8",
    "dynamic": "gptq+tcaq+dynamic-w4a8",
    "envelope": "gptq+envelope-w4a6",
    "grouped": "gptq+grouped-w4a6",
    "average": "gptq+average1-w4a8",
    "error": "gptq+error-w4a6",
    "descent-refit": "descent+refit-w3a8",
    "corrected-damped": "gptq+corrected+damped-w3a8",
    "softmax": "gptq+softmax8-w4a8",
}
WHOLE = ("rtn", "gptq")  # the others quantize only the first and the last block, and what is around them
FIRST_AND_LAST = "multimodal_transformer_blocks.[1-4].*=keep"
FIRST_OF_TEXT = "model.h.[1-3].*=keep"
SOME = ("--override", FIRST_AND_LAST)
LEARNED = {
    "mixed": ("mixed-w4a8", SOME),
    "mixed-inputs": ("gptq+mixed-w4a8", (*SOME, "--bits-per-activation", "6")),
    "taqdit": ("taqdit-w4a8", (*SOME, "--iters", "8")),
    "tcaqdm": ("tcaqdm-w4a8", (*SOME, "--iters", "4")),
    "adaround": ("adaround-w4a8", (*SOME, "--iters", "8")),
    "progressive": ("gptq+progressive-w4a8", SOME),
}
TEXTS = {
    "group": "gptq+unclipped-w4a16-g64",
    "asym": "gptq-w4a8-asym",
    "token": "gptq-w4a8-token",
    "static": "gptq+smoothquant-w4a8-static",
    "qronos": "qronos+rotation-w4a8-g32",
    "branch": "gptaq+svd8-w3a16",
    "corrected-refit": "gptq+corrected+refit-w3a16",
    "learned": "adaround-w3a16",
}
PROMPT = "a large red circle at left on white background"
CASES: dict[str, Callable[[Path], None]] = {}


def case(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register what fills a folder, which is called ``name``."""

    def register(fill: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[name] = fill
        return fill

    return register


def command(folder: Path, *arguments: object) -> None:
    """Run a verb of mlxquant in this process; what it prints for programs is kept in ``folder``, its progress goes
    nowhere.
    """
    said, told, kept = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["mlxquant", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            runpy.run_module("mlxquant", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise click.ClickException(f"mlxquant {' '.join(sys.argv[1:])}: {told.getvalue()}") from end
    finally:
        sys.argv = kept
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arguments[0]}.stdout.json").write_text(said.getvalue().splitlines()[-1])


@cache
def picture_model() -> mq.Model:
    return mq.load("mmdit-shapes")


@cache
def trajectories() -> Any:
    return mq.calibrate(picture_model(), prompts=PROMPTS, steps=STEPS)


@cache
def text_model() -> mq.Model:
    return mq.load("gpt-python")


@cache
def text_file() -> Path:
    """Text for the language models, in the present folder: some of it Python, all of it written here."""
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    lines = [
        f"def {words[n % 5]}_{n}(x, y={n * n % 17}):\n    return x * {n} + y  # {words[n * 7 % 5]}\n"
        for n in range(600)
    ]
    path = Path("text.txt")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@cache
def windows() -> Any:
    return mq.calibrate_text(text_model(), text_file(), samples=6, length=48)


def tokens() -> list[np.ndarray]:
    """Two token arrays int32 [2,16] for SpinQuant."""
    encoded = list(text_file().read_bytes())
    return [np.array(encoded[at : at + 32], np.int32).reshape(2, 16) for at in (0, 32)]


def _pictures(recipe: str, overrides: tuple[str, ...]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        mq.quantize(picture_model(), trajectories(), mq.parse_recipe(recipe, overrides)).save(folder)

    return fill


def _learned(recipe: str, options: tuple[str, ...]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        settings = ("--num-prompts", PROMPTS, "--steps", STEPS, "--out", folder / "model")
        command(folder, "quantize", "--model", "mmdit-shapes", "--recipe", recipe, *settings, *options)

    return fill


def _text(recipe: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        learns = recipe.startswith("adaround")
        options = ("--iters", "2", "--samples", 2, "--override", FIRST_OF_TEXT) if learns else ("--samples", 6)
        settings = ("--data", text_file(), "--length", 24 if learns else 48, "--out", folder / "model")
        command(folder, "quantize", "--model", "gpt-python", "--recipe", recipe, *settings, *options)

    return fill


for _name, _recipe in PICTURES.items():
    CASES[f"pictures-{_name}"] = _pictures(_recipe, () if _name in WHOLE else (FIRST_AND_LAST,))
for _name, (_recipe, _options) in LEARNED.items():
    CASES[f"pictures-{_name}"] = _learned(_recipe, _options)
for _name, _recipe in TEXTS.items():
    CASES[f"text-{_name}"] = _text(_recipe)


@case("commands")
def _(folder: Path) -> None:
    """The commands that stand for a recipe, one picture, the methods there are."""
    pictures = ("--num-prompts", 1, "--steps", 3)
    command(folder, "calibrate-snr", *pictures, "--save-path", folder / "snr")
    command(folder, "quantize-qronos", *pictures, "--save-path", folder / "qronos")
    drawing = ("--prompt", PROMPT, "--seed", 7, "--steps", STEPS)
    command(
        folder,
        "generate",
        "--model",
        folder / "snr",
        *drawing,
        "--compare",
        "mmdit-shapes",
        "--output",
        folder / "circle.png",
    )
    command(folder, "methods")
    mq.compare(picture_model(), mq.load(folder / "qronos"), PROMPT, seed=7, steps=STEPS).save(folder / "compared.png")


@case("steps")
def _(folder: Path) -> None:
    """The six steps of the pipeline, and the recipe that takes their blocks."""
    calib, rounded, config = folder / "calib", folder / "adaround", folder / "calib/activations/quant_config.json"
    command(
        folder,
        "generate-calibration-data",
        "--model",
        "mmdit-shapes",
        "--num-images",
        PROMPTS,
        "--num-steps",
        STEPS,
        "--cfg-weight",
        2,
        "--calib-dir",
        calib,
    )
    command(folder, "cache-adaround-data", "--calib-dir", calib, "--num-images", 1, "--stride", 2)
    command(folder, "adaround-optimize", "--cache-dir", calib / "adaround_cache", "--output-dir", rounded, "--iters", 2)
    command(folder, "collect-layer-activations", "--calib-dir", calib, "--num-images", PROMPTS, "--stride", 2)
    command(
        folder,
        "analyze-activations",
        "--stats",
        calib / "activations/layer_statistics.json",
        "--output",
        config,
        "--migration",
    )
    tracks = ("--adaround-output", rounded, "--quant-config", config)
    command(
        folder,
        "load-adaround-model",
        *tracks,
        "--prompt",
        PROMPT,
        "--num-steps",
        STEPS,
        "--output-image",
        folder / "drawn.png",
        "--compare",
        "--diff-stats",
        "--save",
        folder / "model",
    )


@case("evaluate")
def _(folder: Path) -> None:
    pictures = ("--num-prompts", 2, "--steps", 3, "--num-calibration-prompts", 1)
    command(
        folder, "evaluate", "--model", "mmdit-shapes", "--recipe", "rtn-w4a8", *pictures, "--out", folder / "report"
    )
    command(
        folder,
        "compare-images",
        folder / "report/images/mmdit-shapes",
        folder / "report/images/rtn-w4a8",
        "--out",
        folder / "images",
    )
    for place in ("report", "images", "report/models/rtn-w4a8"):
        command(folder / f"inspect-{Path(place).name}", "inspect", folder / place, "--each")
    drawn = ("--weight", "*blocks.0.image*fc1*", "--sheet")
    command(folder, "visualize", folder / "report/models/rtn-w4a8", *drawn, "--out", folder / "drawn")


@case("exports")
def _(folder: Path) -> None:
    pictures = mq.quantize(picture_model(), trajectories(), "gptq-w4a8-g64")
    texts = mq.quantize(text_model(), windows(), "gptq-w4a16-g64")
    mq.export(pictures, folder / "mlx", "mlx")
    texts.save(folder / "text")
    command(
        folder,
        "export",
        "--model",
        folder / "text",
        "--target",
        "mlx-lm",
        "--out",
        folder / "mlx-lm",
        "--dtype",
        "bfloat16",
    )
    command(folder, "export", "--model", "gpt-python", "--target", "mlx-lm", "--out", folder / "mlx-lm-float")
    command(folder, "inspect", folder / "mlx-lm")
    command(
        folder,
        "perplexity",
        "--model",
        "gpt-python",
        "--model",
        folder / "text",
        "--data",
        text_file(),
        "--length",
        48,
        "--windows",
        4,
    )
    component = _Flux()
    mq.quantize_linears(component, "w4a16-g32", include="transformer_blocks.*")
    mq.export(component, folder / "mflux", "mflux")


@case("spinquant")
def _(folder: Path) -> None:
    folder.mkdir()
    for name, settings in {
        "channel": {"activation_bits": 4, "kv_bits": 8},
        "group": {"bits": 3, "group": 32, "start": "random"},
    }.items():
        model = mq.load("gpt-python").adapter.module
        spin = SpinQuant(model, **settings).optimize(tokens(), steps=3).apply()
        _arrays(folder / f"{name}.safetensors", model)
        (folder / f"{name}.json").write_text(json.dumps({"loss": spin.history, "report": vars(spin.report)}))
    turned = mq.load("gpt-python")
    SpinQuant(turned.adapter.module).optimize(tokens(), steps=2).rotate()
    mq.quantize(turned, mq.calibrate_text(turned, text_file(), samples=4, length=32), "gptq-w4a8-token").save(
        folder / "rotated"
    )


@case("training")
def _(folder: Path) -> None:
    """Full precision, rounding of several kinds, and the integers behind it."""
    small = (
        "--data",
        text_file(),
        "--n-layer",
        2,
        "--n-head",
        2,
        "--n-embd",
        32,
        "--block-size",
        16,
        "--batch-size",
        4,
        "--eval-interval",
        2,
        "--eval-iters",
        1,
        "--eval-windows",
        2,
        "--max-iters",
        4,
        "--quantization-warmup-iters",
        1,
    )
    integers: tuple[object, ...] = (
        "--linear-variant-attn",
        "quantized-linear",
        "--linear-variant-mlp",
        "quantized-linear",
    )
    kinds: dict[str, tuple[object, ...]] = {
        "plain": ("--level", "char", "--save-dtype", "float16"),
        "ternary": (*integers, "--quantize-linear-method", "ternary-quant", "--quantize-wte"),
        "activations": (
            *integers,
            "--quantize-attn-act",
            "--quantize-mlp-act",
            "--store-activations",
            "--quantization-level-schedule",
            "linear",
            "--full-quant-iteration",
            3,
        ),
        "stochastic": (*integers, "--quantize-linear-method", "stochastic-quant", "--activations-quant-scale", "token"),
    }
    for name, options in kinds.items():
        command(folder / name, "train-gpt", "--out-dir", folder / name / "out", *small, *options)
        if name != "plain":
            command(
                folder / name,
                "save-weights",
                "--out-dir",
                folder / name / "out",
                "--file-name",
                folder / name / "integers.npz",
            )
    command(
        folder,
        "visualize",
        folder / "ternary/integers.npz",
        "--graph",
        "matrix",
        "--sheet",
        "--image-folder",
        folder / "drawn",
    )


@case("modules")
def _(folder: Path) -> None:
    """Any module, without data, and single layers."""
    folder.mkdir()
    for format in ("w8a16", "w4a16-g32", "w3a16-sym", "w2a16-g64-asym"):
        model = _Component()
        report = mq.quantize_linears(model, format, embeddings=True, steps="mse", exclude=["out"], fallback="w8a16")
        mq.save_module(model, folder / f"{format}.safetensors")
        (folder / f"{format}.txt").write_text(str(report))
    fake = mq.FakeQuantLinear(in_features=32, out_features=16)
    fake.update({"weight": _normal((16, 32), 1), "bias": _normal((16,), 2)})
    for step in range(4):
        fake(_normal((8, 32), step) * (step + 1), timestamp=step)
    fake.freeze()
    fake.save(folder / "fake.safetensors")
    _arrays(folder / "w8a16-linear.safetensors", mq.W8A16Linear(32, 16).quantize(_normal((16, 32), 3)))


class _Component(nn.Module):
    """A module with a layer of each kind that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 64)
        self.image = nn.Conv2d(4, 64, 3, stride=2, padding=1)
        self.sound = nn.ConvTranspose1d(64, 64, 3)
        self.transformer_blocks = [nn.Linear(64, 128), nn.Linear(128, 64)]
        self.out = nn.Linear(64, 32)
        _fill(self)


class _Flux(nn.Module):
    """With the parts by which mflux knows the transformer of FLUX.1."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder, self.time_text_embed = (nn.Linear(32, 64) for _ in range(3))
        self.transformer_blocks, self.single_transformer_blocks = [nn.Linear(64, 64)], [nn.Linear(64, 64)]
        self.norm_out, self.proj_out = nn.LayerNorm(64), nn.Linear(64, 32)
        _fill(self)


def _flat(module: nn.Module) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(module.parameters()))


def _fill(module: nn.Module) -> None:
    """Random weights, the same every time."""
    arrays = sorted(_flat(module), key=lambda found: found[0])
    module.load_weights([(name, _normal(value.shape, at)) for at, (name, value) in enumerate(arrays)])


def _normal(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _arrays(path: Path, module: nn.Module) -> None:
    """All parameters of a module, sorted by name, as bytes that do not depend on how a library orders its header."""
    with path.open("wb") as file:
        for name, value in sorted(_flat(module), key=lambda found: found[0]):
            file.write(f"{name} {value.dtype} {value.shape}\n".encode())
            file.write(np.array(value.view(mx.uint8) if value.ndim else value[None].view(mx.uint8)).tobytes())


def digest(path: Path) -> str:
    """sha256 of a file without what is ``VARYING`` in it."""
    if path.suffix == ".json":
        return hashlib.sha256(json.dumps(_lasting(json.loads(path.read_text())), sort_keys=True).encode()).hexdigest()
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [_lasting(row) for row in csv.DictReader(file)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lasting(data: Any, top: bool = True) -> Any:
    """JSON without what varies, and at the top without the file's checksum of it."""
    if isinstance(data, dict):
        return {
            key: _lasting(value, False)
            for key, value in data.items()
            if key not in VARYING and not (top and key == "sha256")
        }
    return [_lasting(value, False) for value in data] if isinstance(data, list) else data


def digests(names: list[str]) -> dict[str, str]:
    """By path, of all that the cases write into the present folder."""
    found: dict[str, str] = {}
    for name in tqdm(names, desc="golden", file=sys.stderr, leave=False, dynamic_ncols=True):
        folder = Path(name)
        shutil.rmtree(folder, ignore_errors=True)
        begin = _seconds()
        CASES[name](folder)
        tqdm.write(f"{name}: {_seconds() - begin:.1f} s", file=sys.stderr)
        found |= {str(path): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return found


def differences(kept: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is not the same, a line each."""
    lines = [f"missing  {path}" for path in kept if path not in found]
    lines += [f"new      {path}" for path in found if path not in kept]
    return sorted(lines + [f"changed  {path}" for path in found if kept.get(path, found[path]) != found[path]])


@contextlib.contextmanager
def inside(work: Path | None) -> Iterator[None]:
    """Work in a folder, by default in one that is removed afterwards. Every path is relative to it, so none shows in a
    file.
    """
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) if work is None else work
        place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(contextlib.chdir(place))
        yield


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keep what is written, in this folder.  [default: a temporary one]"
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the digests to this file, not to stdout.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Compare with the digests in this file.")
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice(list(CASES)),
    metavar="NAME",
    help="Only this case; again for more.",
)
def main(work: Path | None, out: Path | None, against: Path | None, names: tuple[str, ...]) -> None:
    begin = _seconds()
    with inside(work):
        found = digests(list(names or CASES))
    listed = "".join(f"{path}  {value}\n" for path, value in sorted(found.items()))
    if out is not None:
        out.write_text(listed)
    elif against is None:
        click.echo(listed, nl=False)
    facts = {"cases": len(names or CASES), "files": len(found), "digest": hashlib.sha256(listed.encode()).hexdigest()}
    wrong: list[str] = []
    if against is not None:
        kept = dict(line.split("  ") for line in against.read_text().splitlines())
        chosen = {path: value for path, value in kept.items() if not names or path.split("/")[0] in names}
        wrong = differences(chosen, found)
        facts["different"] = len(wrong)
        for line in wrong:
            click.echo(line, err=True)
    click.echo(json.dumps({**facts, "seconds": _seconds() - begin}, sort_keys=True))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
