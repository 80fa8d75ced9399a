"""Train the Z-Image of ``z_image_shapes.py``: ``python benchmarks/train_z_image_shapes.py --out DIR``.

As ``mmdit-shapes`` is trained (rectified flow, held-out captions never seen), with captions dropped as often. Every
batch is a function of seed and step alone, and a killed run goes on to the same result. Needs mflux:
``pip install --no-deps mflux==0.24.0``. The last line on stdout is one JSON object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

import mlxquant as mq  # noqa: F401  before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlxquant.commandline.console import progress, result
from mlxquant.files.checked import write_tensors
from mlxquant.files.lock import locked
from mlxquant.files.training_run import TrainingRun
from mlxquant.layers.tree import parameters
from mlxquant.models.shapes.captions import tokenize
from mlxquant.models.shapes.scenes import Scene, draw, sample_scene
from mlxquant.models.train_shapes import build_optimizer
from z_image_shapes import KIND, ZImageShapes, encode

WEIGHTS = f"{KIND}.safetensors"
DROPPED = 0.1  # of captions, for guidance


def fresh_model(seed: int) -> ZImageShapes:
    """Gates and the last layer begin at zero, as in ``mmdit-shapes``."""
    mx.random.seed(seed)
    model = ZImageShapes()
    closed = [
        (name, mx.zeros_like(value))
        for name, value in parameters(model).items()
        if "adaLN_modulation" in name or (".linear." in name and "all_final_layer" in name)
    ]
    model.load_weights(closed, strict=False)
    return model


def batch(seed: int, step: int, size: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Noisy latents, words, noise levels and what the model is to say."""
    rng = np.random.default_rng([seed, step])
    scenes = list[Scene]()
    while len(scenes) < size:
        if not (scene := sample_scene(rng)).held_out:
            scenes.append(scene)
    clean = encode(mx.array(np.stack([draw(scene, rng) for scene in scenes])))
    ids = mx.array([tokenize("" if rng.random() < DROPPED else scene.caption) for scene in scenes])
    noise = mx.array(rng.standard_normal(clean.shape, dtype=np.float32))
    sigma = mx.array(1 / (1 + np.exp(-0.5 - rng.standard_normal(size))).astype(np.float32))
    share = sigma[:, None, None, None]
    return (1 - share) * clean + share * noise, ids, sigma, noise - clean


def training_step(model: ZImageShapes, optimizer: optim.Optimizer) -> Callable[..., mx.array]:
    """One update on a batch; returns the loss."""

    def loss(latents: mx.array, ids: mx.array, sigma: mx.array, target: mx.array) -> mx.array:
        return mx.square(model.velocities(latents, ids, sigma) - target).mean()

    gradients_of = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(*arrays: mx.array) -> mx.array:
        value, gradients = gradients_of(*arrays)
        clipped, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, clipped)
        return value

    return update


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint and weights; resumes.")
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True, help="Peak rate of AdamW.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=100, show_default=True, help="Steps; weights are written as often.")
def main(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int, save_every: int) -> None:
    facts = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    model = fresh_model(seed)
    optimizer = build_optimizer(steps, learning_rate)
    optimizer.init(model.trainable_parameters())
    average = tree_map(mx.array, model.parameters())
    with locked(out, inside=True):
        run = TrainingRun(out, facts)
        if found := {name: tree_unflatten(list(flat.items())) for name, flat in run.resume().items()}:
            model.update(found["model"])
            average, optimizer.state = found["average"], found["optimizer"]
        with run.same_blas():
            update = training_step(model, optimizer)
            recent: deque[float] = deque(maxlen=250)
            steps_left = progress(range(run.step, steps), "train", done=run.step, note=lambda: f"loss {mean(recent)}")
            for step in steps_left:
                value = update(*batch(seed, step, batch_size))
                decay = min(0.999, (1 + step) / (10 + step))
                average = tree_map(partial(blend, decay), average, model.parameters())
                mx.eval(model.state, optimizer.state, average, value)
                run.step = step + 1
                recent.append(float(np.array(value)))
                if run.step % save_every == 0 or run.step == steps:
                    trees = {"model": model.parameters(), "average": average, "optimizer": optimizer.state}
                    run.save(trees, finished=run.step == steps)
                    publish(out / WEIGHTS, average, {**facts, "step": run.step})
    result({"weights": str(out / WEIGHTS), **facts, "loss": mean(recent)})


def publish(file: Path, average: Any, facts: dict[str, Any]) -> None:
    """Averaged weights, float16."""
    write_tensors(file, KIND, {name: value.astype(mx.float16) for name, value in parameters(average).items()}, facts)


def blend(decay: float, average: mx.array, value: mx.array) -> mx.array:
    return decay * average + (1 - decay) * value


def mean(recent: deque[float]) -> float | None:
    return round(float(np.mean(recent)), 4) if recent else None


if __name__ == "__main__":
    main()
