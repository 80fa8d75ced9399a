"""How a GPT is trained: its start, its batches, its optimiser. Every batch is a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..layers.tree import parameters
from ..models.gpt.network import GPT, GPTConfig
from ..numerics.arrays import Array
from .modules import QuantizingWeight

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def fresh_gpt(config: GPTConfig, seed: int) -> GPT:
    """GPT-2's start: matrices normal with deviation 0.02, those that write into the residual stream divided by sqrt(2
    layers).
    """
    model = GPT(config)
    rng = np.random.default_rng(seed)
    started = []
    for name, value in parameters(model).items():
        if value.ndim == 2:
            deviation = 0.02 / (np.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1)
            started.append((name, mx.array(rng.normal(0, deviation, value.shape).astype(np.float32))))
        elif name.endswith("bias"):
            started.append((name, mx.zeros_like(value)))
    model.load_weights(started, strict=False)
    return model


def batch(tokens: Array, seed: int, step: int, size: int, length: int) -> tuple[mx.array, mx.array]:
    """Windows of the text [size,length] int32, and the same one token later."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length, size)
    windows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
    return mx.array(windows[:, :-1]), mx.array(windows[:, 1:])


def build_optimizer(steps: int, learning_rate: float, weight_decay: float = 0.1) -> optim.Optimizer:
    """AdamW: linear warm-up over a twentieth of the run, at most 100 steps, then a cosine to a tenth of the
    peak rate.
    """
    warmup = min(100, steps // 20 + 1)
    rise = optim.linear_schedule(1e-6, learning_rate, warmup)
    fall = optim.cosine_decay(learning_rate, max(steps - warmup, 1), learning_rate / 10)
    schedule = optim.join_schedules([rise, fall], [warmup])
    return optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=weight_decay, bias_correction=True)


def loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy of the next token, nats."""
    return nn.losses.cross_entropy(model(inputs).astype(mx.float32), targets, reduction="mean")


def cast(model: GPT, dtype: mx.Dtype) -> None:
    """Parameters in ``dtype``, but for weights that are rounded to a grid: those are cast after that, by their
    layers.
    """
    for _, module in model.named_modules():
        if not isinstance(module, QuantizingWeight):
            own = {
                name: value.astype(dtype)
                for name, value in module.items()
                if isinstance(value, mx.array) and not name.startswith("_")
            }
            module.update(own)


def training_step(
    model: GPT, optimizer: optim.Optimizer, dtype: mx.Dtype = mx.float32
) -> Callable[[mx.array, mx.array], mx.array]:
    """One update on a batch, gradients clipped to norm 1; returns the loss.

    The parameters stay in float32; forwards and backwards run in ``dtype``.
    """

    def in_dtype(inputs: mx.array, targets: mx.array) -> mx.array:
        cast(model, dtype)
        return loss(model, inputs, targets)

    gradients_of = nn.value_and_grad(model, partial(loss, model) if dtype == mx.float32 else in_dtype)

    def update(inputs: mx.array, targets: mx.array) -> mx.array:
        precise = model.trainable_parameters()
        value, gradients = gradients_of(inputs, targets)
        model.update(precise)
        clipped, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, clipped)
        mx.eval(model.state, optimizer.state, value)
        return value

    return update


def mean_loss(
    model: GPT, tokens: Array, seed: int, batches: int, size: int, length: int, dtype: mx.Dtype = mx.float32
) -> float:
    """The loss on windows of a text, the same ones every time, in nats a token; the model is left as it was."""
    precise = model.parameters()
    model.eval()
    cast(model, dtype)
    values = [np.array(loss(model, *batch(tokens, seed, number, size, length))) for number in range(batches)]
    model.update(precise)
    model.train()
    return float(np.mean(values))
