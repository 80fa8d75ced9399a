"""Which method is best for a language model: ``python benchmarks/language.py --work WORK``.

Bits per character of ``gpt-python`` on held-out modules of Python's standard library, which differs between versions of
Python: LOG.md says which. Weights alone, weights and activations, and quantization-aware training, which goes on from
the same weights for ``--iterations``; a row of as many iterations in full precision stands beside it. Calibration is
the same for all: 64 windows of 256 bytes. Differences are to full precision, window by window, with bootstrap 95 %
intervals. Rows that are in ``WORK.jsonl`` already are not computed again; ``--table`` prints what is there. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx

from mlxquant import train_gpt
from mlxquant.calibration.corpus import read_corpus
from mlxquant.commandline.console import progress, result, say
from mlxquant.layers.tree import parameters
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.prediction import Prediction, predict
from mlxquant.models.gpt.adapter import GPTAdapter
from mlxquant.qat.folders import quantized_gpt
from mlxquant.qat.integer import to_integer_layers
from mlxquant.spin_quant.learning import SpinQuant
from rows import Rows

MODEL = "gpt-python"
METHODS = ("rtn", "gptq", "descent", "gptq+corrected", "qronos")
UNCLIPPED = ("gptq+unclipped", "gptq+unclipped+corrected", "qronos+unclipped")
WEIGHTS = [f"{method}-{form}" for form in ("w4a16", "w4a16-g64", "w3a16", "w2a16-g64") for method in METHODS]
WEIGHTS += [f"{method}-{form}" for form in ("w4a16", "w4a16-g64", "w3a16", "w2a16-g64") for method in UNCLIPPED]
WEIGHTS += [
    f"{method}-{form}"
    for form in ("w4a16", "w4a16-g64", "w3a16", "w2a16-g64")
    for method in ("gptq+regrid", "kron", "kron+mixed", "kron+mixed+tuned")
]
INPUTS = [
    f"{method}-{form}"
    for form in ("w8a8", "w4a8", "w4a8-token", "w4a4", "w4a4-token")
    for method in ("rtn", "gptq", "gptq+corrected", "qronos")
] + ["gptq+rotation-w4a8-token", "gptq+rotation-w4a4-token", "gptq+smoothquant+rotation-w4a4-token"]
SPUN = {  # rows of SpinQuant itself: bits of weights and inputs, steps of learning
    "hadamard w4a4": (4, 4, 0),
    "spinquant w4a4": (4, 4, 100),
    "hadamard w4a8": (4, 8, 0),
    "spinquant w4a4, 400 steps": (4, 4, 400),
    "spinquant w4a8": (4, 8, 100),
    "spinquant w4a16": (4, None, 100),
}
ROTATED = [
    f"spinquant+{rest}" for rest in ("qronos-w4a16", "qronos-w3a16", "gptq+corrected-w3a16", "gptq+rotation-w4a4-token")
]
LINEARS = ["--linear_variant_attn", "quantized_linear", "--linear_variant_mlp", "quantized_linear"]
INPUTS_4 = ["--activations_quant_scale", "token"]
TRAINED = {
    "trained on": [],
    "qat symmetric w8": [*LINEARS, "--quantize_linear_method", "symmetric_quant", "--quantize_linear_bits", "8"],
    "qat symmetric w4": [*LINEARS, "--quantize_linear_method", "symmetric_quant", "--quantize_linear_bits", "4"],
    "qat affine w4": [*LINEARS, "--quantize_linear_method", "affine_quant", "--quantize_linear_bits", "4"],
    "qat stochastic w4": [*LINEARS, "--quantize_linear_method", "stochastic_quant", "--quantize_linear_bits", "4"],
    "qat symmetric w3": [*LINEARS, "--quantize_linear_method", "symmetric_quant", "--quantize_linear_bits", "3"],
    "qat symmetric w2": [*LINEARS, "--quantize_linear_method", "symmetric_quant", "--quantize_linear_bits", "2"],
    "qat ternary": [*LINEARS, "--quantize_linear_method", "ternary_quant"],
    "qat symmetric w4, activations 8": [*LINEARS, "--quantize_linear_method", "symmetric_quant",
    "--quantize_linear_bits", "4",
                                        "--quantize_attn_act", "--quantize_mlp_act"],
    "qat symmetric w4, activations 4 a token": [*LINEARS, "--quantize_linear_method", "symmetric_quant",
    "--quantize_linear_bits", "4",
                                                *INPUTS_4, "--quantize_attn_act", "--quantize_mlp_act",
                                                "--quantize_attn_act_bits", "4", "--quantize_mlp_act_bits", "4"],
}  # fmt: skip


class Bench:
    """The model, the text, and the finished rows."""

    def __init__(self, work: Path, windows: int, iterations: int):
        self.model, self.corpus = mq.load(MODEL), read_corpus()
        self.windows, self.iterations = windows, iterations
        model, text = self.model.adapter.fingerprint[:8], str(self.corpus.facts["sha256"])[:8]
        self.rows = Rows(work, model=model, text=text, windows=windows)
        self.calibration = mq.calibrate_text(self.model, samples=64)

    def kept(self, name: str) -> dict[str, Any]:
        """A row that is there, or measured now."""
        return self.rows.kept(name, partial(self.measure, name))

    def measure(self, name: str) -> dict[str, Any]:
        make: Callable[[], tuple[mq.Model, float]] = partial(self.by_recipe, name)
        if name == "full precision":
            make = self.exact
        elif name.startswith("data-free "):
            make = partial(self.without_data, name.removeprefix("data-free "))
        elif name in SPUN:
            make = partial(self.spun, *SPUN[name])
        elif name.startswith("spinquant+"):
            make = partial(self.rotated, name.removeprefix("spinquant+"))
        elif name in TRAINED:
            make = partial(self.trained, name)
        start = time.process_time()
        model, bits = make()
        seconds = time.process_time() - start
        adapter = model.language
        found = predict(
            adapter.logits, adapter.tokenizer, self.corpus.held_out, adapter.context, self.windows, progress=progress
        )
        stored = sum(value.nbytes for value in parameters(adapter.module).values())
        return {"nats": found.nats.tolist(), "tokens": found.tokens.tolist(), "characters": found.characters.tolist(),
                "bytes": stored, "bits_per_weight": bits, "seconds": seconds}  # fmt: skip

    def exact(self) -> tuple[mq.Model, float]:
        return self.model, 16.0

    def by_recipe(self, name: str, model: mq.Model | None = None) -> tuple[mq.Model, float]:
        model = self.model if model is None else model
        calib = self.calibration if model is self.model else mq.calibrate_text(model, samples=64)
        done = mq.quantize(model, calib, name, progress=progress)
        return done, done.size.bits_per_quantized_weight

    def without_data(self, form: str) -> tuple[mq.Model, float]:
        copy = self.model.clone()
        mq.quantize_linears(copy.module, form)
        return mq.Model(copy), mq.QuantizedModel(copy, {}).size.bits_per_quantized_weight

    def spun(self, weight: int, inputs: int | None, steps: int) -> tuple[mq.Model, float]:
        """SpinQuant by itself: rotations learned or, without steps, Hadamard matrices; GPTQ; inputs a token; R4
        online.
        """
        copy = self.model.clone()
        copy.module.set_dtype(mx.float32)
        spin = SpinQuant(copy.module, weight, inputs)
        if steps:
            spin.optimize(self.batches, steps=steps, progress=progress)
        spin.apply(self.batches, progress=progress)
        done = mq.QuantizedModel(GPTAdapter(copy.module, self.model.language.tokenizer, {}), {})
        return done, done.size.bits_per_quantized_weight

    def rotated(self, recipe: str) -> tuple[mq.Model, float]:
        """Rotations learned for the bits of a recipe and folded, then the recipe."""
        spec = dict(mq.parse_recipe(recipe).rules)["*"]
        assert spec is not None
        copy = self.model.clone()
        copy.module.set_dtype(mx.float32)
        inputs = None if spec.activation is None else spec.activation.bits
        SpinQuant(copy.module, spec.weight.bits, inputs).optimize(self.batches, steps=100, progress=progress).rotate()
        return self.by_recipe(recipe, mq.Model(GPTAdapter(copy.module, self.model.language.tokenizer, {})))

    @property
    def batches(self) -> list[Any]:
        """The calibration text, four windows at once."""
        return [self.calibration.windows[start : start + 4] for start in range(0, len(self.calibration.windows), 4)]

    def trained(self, name: str) -> tuple[mq.Model, float]:
        folder = self.rows.folder() / "trained" / name.replace(", ", "_").replace(" ", "-")
        arguments = ["--init-from", MODEL, "--out-dir", str(folder), "--max-iters", str(self.iterations),
        "--batch-size", "8",
                     "--learning-rate", "5e-4", "--eval-interval", "0", "--eval-windows", "1",
                     "--quantization_warmup_iters", "0"]  # fmt: skip
        train_gpt.command.main([*arguments, *TRAINED[name]], standalone_mode=False)
        module, tokenizer, _ = quantized_gpt(folder)
        bits = 16.0
        if TRAINED[name]:
            module = to_integer_layers(module)
            layers = mq.Model(GPTAdapter(module, tokenizer, {}))
            bits = mq.QuantizedModel(layers.adapter, {}).size.bits_per_quantized_weight
        return mq.Model(GPTAdapter(module, tokenizer, {})), bits


def rows() -> list[str]:
    return ["full precision", "data-free w8a16", "data-free w4a16-g64", *WEIGHTS, *INPUTS, *SPUN, *ROTATED, *TRAINED]


def summary(row: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    mine, first = (
        Prediction(np.array(r["nats"]), np.array(r["tokens"]), np.array(r["characters"])) for r in (row, exact)
    )
    difference = mine.each - first.each
    return {
        "bits_per_character": mine.bits_per_character,
        "difference": float(difference.mean()),
        "difference_95": interval(difference),
        "bytes": row["bytes"],
        "bits_per_weight": row["bits_per_weight"],
        "seconds": row["seconds"],
    }


def table_of(figures: dict[str, dict[str, Any]]) -> str:
    """The summaries of rows in Markdown."""
    titles = (
        "| recipe | bits per character | against full precision (95 %) | bits a quantized weight | MB | CPU seconds |"
    )
    return "\n".join([titles, "|---|---|---|---|---|---|", *(line(name, row) for name, row in figures.items())])


def line(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["difference_95"]
    return (
        f"| `{name}` | {figures['bits_per_character']:.4f} | {figures['difference']:+.4f} ({low:+.4f} to {high:+.4f}) "
        f"| {figures['bits_per_weight']:.2f} | {figures['bytes'] / 1e6:.2f} | {figures['seconds']:.0f} |"
    )


@click.command(help=__doc__)
@click.option("--windows", default=256, show_default=True, help="Of 256 bytes, evenly spread over the held-out text.")
@click.option("--iterations", default=200, show_default=True, help="Of quantization-aware training.")
@click.option("--row", "names", multiple=True, help="Only these rows; any recipe will do.")
@click.option("--table", is_flag=True, help="Print the rows that are there, and measure nothing.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Rows are kept in WORK.jsonl.")
def main(windows: int, iterations: int, names: tuple[str, ...], table: bool, work: Path) -> None:
    bench = Bench(work, windows, iterations)
    there = bench.rows.figures()
    wanted = list(names) or [name for name in rows() if not table or name in there]
    exact = bench.kept("full precision")
    figures = {name: summary(bench.kept(name), exact) for name in wanted}
    say(table_of(figures))
    result({"text": bench.corpus.facts, "platform": platform.platform(), "rows": figures})


if __name__ == "__main__":
    main()
