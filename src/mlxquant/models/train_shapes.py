"""Train the embedded model ``mmdit-shapes``: ``python -m mlxquant.models.train_shapes --out DIR``.

Rectified flow (arXiv 2403.03206): logit-normal sigma, x_sigma = (1 - sigma) image + sigma noise, target noise - image,
caption dropout for guidance, AdamW with warm-up and a final decay, an exponential moving average of the weights. Every
batch is a function of (seed, step) alone, and optimizer, weights and average are checkpointed, so a killed run resumes
to the same result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from ..commandline.console import Command, during_command, progress, result
from ..commandline.options import COUNT, PATH, option
from ..files.checked import write_tensors
from ..files.lock import locked
from ..files.training_run import TrainingRun
from ..layers.tree import parameters
from .mmdit.config import MMDiTConfig
from .shapes.adapter import WEIGHTS, ShapesModel, to_latent
from .shapes.captions import tokenize
from .shapes.scenes import Scene, draw, sample_scene

CONFIG = MMDiTConfig(
    num_heads=4,
    depth_multimodal=6,
    hidden_size=128,
    vae_latent_dim=12,
    max_latent_resolution=16,
    pooled_text_embed_dim=128,
    token_level_text_embed_dim=128,
    frequency_embed_dim=128,
)


def fresh_model(seed: int) -> ShapesModel:
    """adaLN-zero, a zero output layer and sinusoidal positions; the rest is MLX's default, seeded."""
    mx.random.seed(seed)  # MLX's layers initialise from the global state
    model = ShapesModel(CONFIG)
    zeros = [
        (name, mx.zeros_like(value))
        for name, value in parameters(model).items()
        if "adaLN_modulation" in name or "final_layer.linear" in name
    ]
    model.load_weights(zeros, strict=False)
    side, dims = CONFIG.max_latent_resolution, CONFIG.hidden_size
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1, 1).astype(np.float32)
    frequency = 0.5 ** (np.arange(dims // 4, dtype=np.float32) * 8 / (dims // 4))
    table = np.concatenate([f(a * frequency * np.pi / 2) for a in (y, x) for f in (np.sin, np.cos)], axis=1)
    model.x_pos_embedder.pos_embed.weight = mx.array(0.5 * table)
    return model


def batch(seed: int, step: int, size: int, dropout: float = 0.1) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """One training batch: noisy latents, caption ids, t = 1000 sigma, target velocity. Held-out captions never
    appear.
    """
    rng = np.random.default_rng([seed, step])
    scenes: list[Scene] = []
    while len(scenes) < size:
        scene = sample_scene(rng)
        if not scene.held_out:
            scenes.append(scene)
    clean = to_latent(mx.array(np.stack([draw(s, rng) for s in scenes])))
    ids = mx.array([tokenize("" if rng.random() < dropout else s.caption) for s in scenes])
    noise = mx.array(rng.standard_normal(clean.shape, dtype=np.float32))
    sigma = mx.array(1 / (1 + np.exp(-0.5 - rng.standard_normal(size))).astype(np.float32))
    s = sigma[:, None, None, None]
    return (1 - s) * clean + s * noise, ids, 1000 * sigma, noise - clean


def build_optimizer(steps: int, learning_rate: float) -> optim.Optimizer:
    """AdamW: linear warm-up over 200 steps, constant, then linear decay to nothing over the last fifth."""
    warmup, decay = min(200, steps // 10 + 1), steps // 5 + 1
    rise, fall = optim.linear_schedule(1e-6, learning_rate, warmup), optim.linear_schedule(learning_rate, 1e-6, decay)
    schedule = optim.join_schedules([rise, lambda _: mx.array(learning_rate), fall], [warmup, steps - decay])
    return optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=0.01, bias_correction=True)


def publish(folder: Path, average: Any, facts: Mapping[str, Any]) -> Path:
    """Write averaged weights, float16, as the package ships them."""
    weights = {name: value.astype(mx.float16) for name, value in parameters(average).items()}
    write_tensors(folder / WEIGHTS, "mmdit-shapes", weights, facts)
    return folder / WEIGHTS


def training_step(
    model: ShapesModel, optimizer: optim.Optimizer, workers: mx.distributed.Group
) -> Callable[..., mx.array]:
    """One update on a batch, of which each worker takes its share; returns the loss."""

    def loss(x: mx.array, ids: mx.array, t: mx.array, target: mx.array) -> mx.array:
        tokens, pooled = model.text_encoder(ids)
        return mx.square(model(x, tokens, pooled, t) - target).mean()

    weights = [model.state]
    gradients_of = mx.compile(nn.value_and_grad(model, loss), inputs=weights, outputs=weights)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def apply(gradients: Any) -> mx.array:
        clipped, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, clipped)
        return norm

    def update(*arrays: mx.array) -> mx.array:
        value, gradients = gradients_of(*(x[workers.rank() :: workers.size()] for x in arrays))
        mx.eval(apply(nn.average_gradients(gradients, workers)))
        return mx.distributed.all_sum(value, group=workers) / workers.size()

    return update


@click.command(cls=Command)
@option("--out", type=PATH, required=True, help="Folder for checkpoint and weights; run again to resume.")
@option("--steps", default=6000, type=COUNT)
@option("--batch-size", default=32, type=COUNT)
@option("--learning-rate", default=2e-3, help="Peak rate of AdamW.")
@option("--seed", default=0)
@option("--save-every", default=100, type=COUNT)
def main(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int, save_every: int) -> None:
    """Train mmdit-shapes from nothing: 46 minutes on one core of the machine it was made on. Ctrl-C and the same
    command resume.

    ``mlx.launch -n 2 --backend ring`` before the command shares every batch between two processes.
    """
    workers = mx.distributed.init()
    chief = workers.rank() == 0
    if chief:
        during_command(locked(out, inside=True))
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    facts = {"config": CONFIG.to_dict(), **settings, "command": f"python -m mlxquant.models.train_shapes {options}"}
    model = fresh_model(seed)
    optimizer = build_optimizer(steps, learning_rate)
    optimizer.init(model.trainable_parameters())
    average = tree_map(mx.array, model.parameters())
    run = TrainingRun(out, facts)
    if found := {name: tree_unflatten(list(flat.items())) for name, flat in run.resume().items()}:
        model.update(found["model"])
        average, optimizer.state = found["average"], found["optimizer"]
    during_command(run.same_blas())
    update = training_step(model, optimizer, workers)
    recent: deque[float] = deque(maxlen=250)
    left: Iterable[int] = range(run.step, steps)
    if chief:
        left = progress(left, "train", done=run.step, note=lambda: f"loss {np.mean(recent):.4f}")
    for step in left:
        value = update(*batch(seed, step, batch_size))
        decay = min(0.999, (1 + step) / (10 + step))
        average = tree_map(partial(_blend, decay), average, model.parameters())
        mx.eval(model.state, optimizer.state, average, value)
        run.step = step + 1
        recent.append(float(np.array(value)))
        if chief and (run.step % save_every == 0 or run.step == steps):
            trees = {"model": model.parameters(), "average": average, "optimizer": optimizer.state}
            run.save(trees, finished=run.step == steps)
    if chief:
        result(
            {
                "weights": str(publish(out, average, facts)),
                "steps": steps,
                "loss": float(np.mean(recent)) if recent else None,
            }
        )


def _blend(decay: float, average: mx.array, value: mx.array) -> mx.array:
    return decay * average + (1 - decay) * value


if __name__ == "__main__":
    main()
