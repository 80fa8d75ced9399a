"""A GPT that is trained in a moment, and text for it."""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxquant.models.gpt.network import GPT, GPTConfig
from mlxquant.qat.convert import quantize_while_training
from mlxquant.qat.options import QuantizationOptions

CONFIG = GPTConfig(vocab_size=61, n_positions=24, n_embd=32, n_head=2, n_layer=2)
SMALL = [
    "--n_layer",
    "2",
    "--n_head",
    "2",
    "--n_embd",
    "32",
    "--block_size",
    "16",
    "--batch_size",
    "4",
    "--eval_interval",
    "0",
]
TEXT = "".join(f"def f{n}(x):\n    return x + {n * n}  # {n % 7} é\n\n" for n in range(120))


def random_gpt(seed=0):
    """Weights large enough that everything matters, the same every time."""
    model = GPT(CONFIG)
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    model.update(tree_map(lambda x: mx.random.normal(x.shape, key=next(keys)) * 0.3, model.parameters()))
    mx.eval(model.parameters())
    return model


def prepared(given, seed=0):
    """The random GPT, to be trained through what was given, and its ramp."""
    model = random_gpt()
    return model, quantize_while_training(model, QuantizationOptions(given), seed)


def tokens(rows=2, length=12, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)))


def text_file(folder):
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
