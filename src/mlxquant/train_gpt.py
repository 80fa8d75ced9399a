"""``mlxquant train-gpt``: train a small GPT on text, in full precision or through fake quantizers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from .calibration.corpus import Corpus, read_corpus
from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import COUNT, FROM_ZERO, PATH, UNDERSCORES, option, seed_option, verbose_option
from .errors import AdapterError, ArtifactError, CalibrationError, NumericsError, RecipeError
from .files import checked
from .files.atomic import ensure_writable
from .files.checked import array_digest
from .files.lock import locked
from .files.parameters import load_parameters
from .files.training_run import CHECKPOINT, TrainingRun
from .layers.tree import parameters
from .metrics.prediction import predict
from .models.catalog import pretrained
from .models.gpt.adapter import GPTAdapter
from .models.gpt.files import CONFIG, is_gpt_folder, load_gpt, save_gpt
from .models.gpt.network import GPT, GPTConfig
from .models.gpt.tokenizers import TOKENIZERS, ByteTokenizer, CharTokenizer, tokenizer_for
from .qat.command_line import PATTERNS, quantization_options
from .qat.convert import kept_activations, quantize_while_training, restore_activations
from .qat.folders import QUANTIZATION, quantized_gpt, save_activations
from .qat.options import QuantizationOptions
from .qat.training import DTYPES, batch, build_optimizer, fresh_gpt, mean_loss, training_step

SHAPE = {"n_layer": 4, "n_head": 6, "n_embd": 192, "block_size": 256}  # of a model that starts from nothing


def kept(model: GPT, optimizer: optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds: parameters, the optimizer's state, and what points between layers have stored."""
    return {"model": model.parameters(), "optimizer": optimizer.state, "activations": kept_activations(model)}


def go_on(run: TrainingRun, model: GPT, optimizer: optim.Optimizer) -> None:
    """Take model and optimizer to where an earlier run in this folder was, if there was one."""
    if found := run.resume():
        load_parameters(model, found["model"], str(run.checkpoint))
        restore_activations(model, found.get("activations", {}))
        optimizer.state = tree_unflatten(list(found["optimizer"].items()))


def start(
    reference: str | None, level: str | None, corpus: Corpus, seed: int, **shape: int | None
) -> tuple[GPT, ByteTokenizer | CharTokenizer]:
    """A model and its tokenizer: a fresh one, or, of a folder or a name, one that is trained on; its shape is then its
    own.

    Raises RecipeError when something else is asked of a trained model, AdapterError when it is no GPT of ours.
    """
    if reference is None:
        tokenizer = tokenizer_for(level or "byte", corpus.train + corpus.held_out)
        own = {name: SHAPE[name] if value is None else value for name, value in shape.items()}
        config = GPTConfig(tokenizer.vocab_size, own["block_size"], own["n_embd"], own["n_head"], own["n_layer"])
        return fresh_gpt(config, seed), tokenizer
    model, tokenizer = trained(reference)
    config = model.config
    found = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
    "block_size": config.n_positions,
             "level": tokenizer.level}  # fmt: skip
    if other := [
        f"{name} {found[name]}" for name, asked in {**shape, "level": level}.items() if asked not in (None, found[name])
    ]:
        raise RecipeError(f"{reference} has {', '.join(other)}; leave out what describes another model")
    model.set_dtype(mx.float32)
    return model, tokenizer


def trained(reference: str) -> tuple[GPT, ByteTokenizer | CharTokenizer]:
    """A GPT of ours in full precision, also one that was trained through rounding; raises AdapterError when it
    is none.
    """
    if is_gpt_folder(Path(reference)):
        return load_gpt(Path(reference))[:2]
    adapter = pretrained(reference)
    if not isinstance(adapter, GPTAdapter) or not isinstance(adapter.module, GPT):
        raise AdapterError(
            f"{reference}: only GPTs of ours can be trained on; expected a folder that train-gpt wrote, or gpt-python"
        )
    return adapter.module, adapter.tokenizer


@click.command("train-gpt", cls=Command, context_settings=UNDERSCORES, epilog=PATTERNS)
@option("--out-dir", type=PATH, default="out", help="Folder to write; run again to resume.")
@option("--data", type=PATH, help="A text file.  [default: the sources of Python's standard library]")
@option("--init-from", help="Train on: a folder that this command wrote, or gpt-python.")
@option("--level", type=click.Choice(sorted(TOKENIZERS)), help="What a token is.  [default: byte]")
@option("--n-layer", type=COUNT, help=f"Blocks.  [default: {SHAPE['n_layer']}]")
@option("--n-head", type=COUNT, help=f"Heads of an attention.  [default: {SHAPE['n_head']}]")
@option("--n-embd", type=COUNT, help=f"Width.  [default: {SHAPE['n_embd']}]")
@option("--block-size", type=click.IntRange(2), help=f"Tokens of a window.  [default: {SHAPE['block_size']}]")
@option("--batch-size", default=16, type=COUNT, help="Windows of an iteration.")
@option("--max-iters", default=1500, type=COUNT, help="Iterations of the whole run.")
@option("--learning-rate", default=2e-3, type=click.FloatRange(0, min_open=True), help="Peak rate of AdamW.")
@option("--weight-decay", default=0.1, type=click.FloatRange(0))
@seed_option()
@option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of activations; the weights stay float32.")
@option("--save-dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the weights written.")
@option("--eval-interval", default=250, type=FROM_ZERO, help="Between looks at held-out text.")
@option("--eval-iters", default=4, type=COUNT, help="Batches of such a look.")
@option("--eval-windows", default=256, type=COUNT, help="Of held-out text, for the final figure.")
@quantization_options
@verbose_option
def command(
    out_dir: Path, data: Path | None, init_from: str | None, level: str | None, n_layer: int | None,
    n_head: int | None, n_embd: int | None,
    block_size: int | None, batch_size: int, max_iters: int, learning_rate: float, weight_decay: float, seed: int,
    dtype: str,
    save_dtype: str, eval_interval: int, eval_iters: int, eval_windows: int, **given: Any,
) -> None:  # fmt: skip
    """Train a small GPT, also through fake quantizers.

    On any text. Ctrl-C and the same command resume, to the same bytes.

    The folder is one that mlx-lm loads. Its weights are in full precision; 'mlxquant save-weights' writes the integers
    behind them.
    """
    options = QuantizationOptions({name: value for name, value in given.items() if value is not None})
    corpus = read_corpus(data)
    model, tokenizer = start(
        init_from, level, corpus, seed, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size
    )
    length = model.config.n_positions
    tokens = {
        part: encoded(tokenizer, text, length, part)
        for part, text in (("train", corpus.train), ("held-out", corpus.held_out))
    }
    training = {
        "max_iters": max_iters, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay,
        "seed": seed,
        "dtype": dtype, "init_from": None if init_from is None else Path(init_from).name,
        "started_at": None if init_from is None else weights_digest(model),
    }  # fmt: skip
    facts: dict[str, Any] = {
        "model": model.config.to_dict(),
        "text": corpus.facts,
        "training": training,
        QUANTIZATION: options.to_dict(),
    }
    warmup = options["quantization_warmup_iters"]
    if options.anything and warmup >= max_iters:
        say(
            f"none of the {max_iters} iterations is quantized, the warm-up takes {warmup}; lower"
            " --quantization-warmup-iters"
        )
    ramp = quantize_while_training(model, options, seed, DTYPES[dtype])
    optimizer = build_optimizer(max_iters, learning_rate, weight_decay)
    optimizer.init(model.trainable_parameters())
    during_command(locked(out_dir, inside=True))
    run = TrainingRun(out_dir, facts)
    go_on(run, model, optimizer)
    refuse_foreign(run)
    during_command(run.same_blas())
    ensure_writable(out_dir)

    update = training_step(model, optimizer, DTYPES[dtype])
    recent: list[float] = []
    began, first = time.perf_counter(), run.step
    for step in progress(
        range(first, max_iters), "train", done=first, note=lambda: f"loss {np.mean(recent[-50:]):.4f}"
    ):
        ramp.iteration = step
        recent.append(float(np.array(update(*batch(tokens["train"], seed, step, batch_size, length)))))
        if not np.isfinite(recent[-1]):
            raise NumericsError(
                f"the loss of iteration {step} is {recent[-1]}; use a lower --learning-rate, or --dtype float32"
            )
        run.step = step + 1
        if eval_interval and run.step % eval_interval == 0:
            held_out = mean_loss(model, tokens["held-out"], seed, eval_iters, batch_size, length, DTYPES[dtype])
            say(f"iteration {run.step}: loss {np.mean(recent[-50:]):.4f}, held-out {held_out:.4f} nats a token")
        if run.step == max_iters or run.due:
            run.save(kept(model, optimizer), finished=run.step == max_iters)
    seconds = time.perf_counter() - began
    save_gpt(out_dir, model, tokenizer, facts, DTYPES[save_dtype])
    save_activations(out_dir, model)
    trained, _, _ = quantized_gpt(out_dir)  # what was written is what is measured
    found = predict(trained, tokenizer, corpus.held_out, length, eval_windows, progress=progress)
    say(
        f"{out_dir}: {found.bits_per_character:.4f} bits per character of held-out"
        f" text{', quantized' if options.anything else ''}"
    )
    result({
        "out": str(out_dir), "iterations": max_iters, "bits_per_character": found.bits_per_character,
        "perplexity": found.perplexity,
        "loss": float(np.mean(recent[-50:])) if recent else None, "quantized": options.anything,
        "parameters": count(model),
        "iterations_a_second": len(recent) / seconds if recent else None, "peak_bytes": peak_bytes(),
    })  # fmt: skip


def encoded(tokenizer: ByteTokenizer | CharTokenizer, text: str, length: int, part: str) -> Any:
    """Tokens int32 [n]; raises CalibrationError when there is not even one window."""
    tokens = tokenizer.encode(text)
    if len(tokens) <= length:
        raise CalibrationError(
            f"the {part} text has {len(tokens)} tokens, a window {length}; pass more --data or a smaller --block-size"
        )
    return tokens


def refuse_foreign(run: TrainingRun) -> None:
    """Raise ArtifactError when the folder holds a model and nothing to resume it from: it would be replaced."""
    if (run.folder / CONFIG).exists() and not run.checkpoint.exists():
        raise ArtifactError(
            f"{run.folder} holds a model without {CHECKPOINT}; choose another --out-dir, or remove it yourself"
        )


def weights_digest(model: GPT) -> str:
    """What a model that is trained on starts as."""
    return checked.digest({name: array_digest(value) for name, value in parameters(model).items()})


def count(model: GPT) -> int:
    return sum(value.size for value in parameters(model).values())


if __name__ == "__main__":
    command()
