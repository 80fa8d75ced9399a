"""Write a folder of each kind that this release writes: ``python tests/releases/write.py``, once a release, by its
code.

The result, ``tests/releases/VERSION``, is kept for ever: ``tests/test_releases.py`` loads what every release has
written. The models are tiny and their weights are random, so that all of it is about a megabyte. ``embedded`` takes the
place of the models that ship with the package (``tiny_assets``), so that every command runs as its user would run it.
``expected.json`` and ``expected.npz`` have what the models said and drew when they were written.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from click.testing import CliRunner
from mlx.utils import tree_flatten

HERE = Path(__file__).parent
PROMPT = mq.Prompt(3, "a large red circle at left on white background")
STEPS = 2
TEXT = "".join(f"def f{n}(x):\n    return x + {n * n}  # {n % 7}\n\n" for n in range(120))
CONFIG = {
    "num_heads": 2,
    "depth_multimodal": 1,
    "hidden_size": 32,
    "vae_latent_dim": 12,
    "max_latent_resolution": 16,
    "pooled_text_embed_dim": 32,
    "token_level_text_embed_dim": 32,
    "frequency_embed_dim": 32,
    "mlp_ratio": 2,
}
RECIPES = {  # a kind of input, transform or branch each
    "timestep": "gptq+smoothquant+shift+softmax8-w4a8",
    "static": "rtn-w4a8-g32-static",
    "token": "gptq+rotation-w3a8-token",
    "branch": "gptq+tcaq+svd4+dynamic-w4a6",
}
TRAINING = [
    *("--data", "text.txt", "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16"),
    *("--batch-size", "4", "--eval-interval", "0", "--eval-windows", "2"),
]


class Parts(nn.Module):
    """A module with a layer of each kind that ``quantize_linears`` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden, self.out = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 4, bias=False)
        self.image, self.sound = nn.Conv2d(4, 32, 3, padding=1), nn.ConvTranspose1d(32, 8, 3)

    def __call__(self, tokens: mx.array, image: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return self.out(self.hidden(self.tokens(tokens))), self.image(image), self.sound(self.tokens(tokens))


def inputs() -> tuple[mx.array, mx.array]:
    """What ``Parts`` is shown."""
    return mx.array([[1, 5, 19, 0, 7, 7]]), mx.array(normal((1, 6, 6, 4), 9))


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@contextlib.contextmanager
def tiny_assets(folder: Path) -> Iterator[None]:
    """Let the models in ``folder`` be those that ship with the package."""
    import mlxquant.assets as shipped

    place = folder.absolute()
    spec = spec_from_file_location("mlxquant.assets", place / "__init__.py", submodule_search_locations=[str(place)])
    sys.modules["mlxquant.assets"] = module_from_spec(spec)  # importlib.resources finds its files by this
    try:
        yield
    finally:
        sys.modules["mlxquant.assets"] = shipped


def command(*arguments: object) -> dict:
    """Run a verb of mlxquant; its facts."""
    main = runpy.run_module("mlxquant", run_name="mlxquant.run")["main"]
    outcome = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout.splitlines()[-1])


def picture(model: mq.Model) -> np.ndarray:
    return model.images([PROMPT], steps=STEPS)[0]


def write_tiny_model(path: Path) -> None:
    """``mmdit-shapes``, smaller and at random, in the file that ships."""
    from mlxquant.files.checked import write_tensors
    from mlxquant.models.shapes.adapter import MMDiTShapes

    adapter = MMDiTShapes.blank({"config": CONFIG})
    shapes = sorted((name, value.shape) for name, value in tree_flatten(adapter.module.parameters()))
    arrays = {name: mx.array(normal(shape, at) * 0.15).astype(mx.float16) for at, (name, shape) in enumerate(shapes)}
    write_tensors(path, "mmdit-shapes", arrays, {"config": adapter.module.config.to_dict()})


def write() -> tuple[dict, dict]:
    """Fill the present folder; what is expected of it: numbers, and arrays."""
    said, drawn = {}, {}
    small = ("--num-prompts", 1, "--steps", STEPS)
    for name, recipe in RECIPES.items():
        command("quantize", "--model", "mmdit-shapes", "--recipe", recipe, *small, "--out", f"pictures/{name}")
        drawn[f"pictures/{name}"] = picture(mq.load(f"pictures/{name}"))
    calib = "steps/calib"
    pictures = ("--num-images", 1, "--num-steps", STEPS, "--cfg-weight", 2, "--calib-dir", calib)
    command("generate-calibration-data", "--model", "mmdit-shapes", *pictures)
    command("cache-adaround-data", "--calib-dir", calib, "--num-images", 1, "--stride", 1)
    command(
        "adaround-optimize", "--cache-dir", f"{calib}/adaround_cache", "--output-dir", "steps/adaround", "--iters", 2
    )
    command("collect-layer-activations", "--calib-dir", calib, "--num-images", 1, "--stride", 1, "--rows", 4)
    command("analyze-activations", "--stats", f"{calib}/activations/layer_statistics.json")
    tracks = ("--adaround-output", "steps/adaround", "--quant-config", f"{calib}/activations/quant_config.json")
    drawing = ("--prompt", PROMPT.text, "--num-steps", STEPS, "--output-image", "steps/drawn.png", "--diff-stats")
    command("load-adaround-model", *tracks, *drawing, "--save", "steps/model")
    drawn["steps/model"] = picture(mq.load("steps/model"))
    command("export", "--model", "pictures/static", "--target", "mlx", "--out", "exports/mlx")
    drawn["exports/mlx"] = picture(mq.load("exports/mlx"))
    evaluated = ("--num-prompts", 1, "--steps", STEPS)
    command("evaluate", "--model", "mmdit-shapes", "--model", "pictures/static", *evaluated, "--out", "report")
    Path("report/report.html").unlink()  # large, and nothing reads it but a browser

    Path("text.txt").write_text(TEXT)
    windows = ("--data", "text.txt", "--samples", 2, "--length", 16)
    command("quantize", "--model", "gpt-python", "--recipe", "gptq+svd4-w4a16-g32", *windows, "--out", "text/group")
    command(
        "quantize",
        "--model",
        "gpt-python",
        "--recipe",
        "gptq+smoothquant-w4a8-static",
        *windows,
        "--out",
        "text/static",
    )
    turned = mq.load("gpt-python")
    tokens = [np.array(list(TEXT[:32].encode()), np.int32).reshape(2, 16)]
    mq.SpinQuant(turned.adapter.module).optimize(tokens, steps=1).rotate()
    mq.quantize(turned, mq.calibrate_text(turned, "text.txt", 2, 16), "gptq-w4a8-token").save("text/turned")
    command("quantize", "--model", "gpt-python", "--recipe", "rtn-w8a16-g32", *windows, "--out", "plain")
    command("export", "--model", "plain", "--target", "mlx-lm", "--out", "exports/mlx-lm")
    shutil.rmtree("plain")
    learning = ("--max-iters", 2, "--quantization-warmup-iters", 0, "--save-dtype", "float16")
    rounded = (
        "--linear-variant-attn",
        "quantized-linear",
        "--linear-variant-mlp",
        "quantized-linear",
        "--quantize-mlp-act",
    )
    command("train-gpt", "--out-dir", "text/trained", *TRAINING, *learning, *rounded, "--quantize-wte")
    command("save-weights", "--out-dir", "text/trained", "--file-name", "integers.npz")
    for place in sorted(Path("text").iterdir()):
        said[str(place)] = mq.load(place).predict(TEXT[:400], length=16).bits_per_character

    module = Parts()
    arrays = sorted((name, value.shape) for name, value in tree_flatten(module.parameters()))
    module.load_weights([(name, mx.array(normal(shape, at))) for at, (name, shape) in enumerate(arrays)])
    mq.quantize_linears(module, "w4a16-g32", embeddings=True, exclude="out", fallback="w8a16")
    mq.save_module(module, "module.safetensors")
    for at, array in enumerate(module(*inputs())):
        drawn[f"module.{at}"] = np.array(array)
    fake = mq.FakeQuantLinear(32, 8)
    fake.update({"weight": mx.array(normal((8, 32), 1)), "bias": mx.array(normal((8,), 2))})
    for step in range(3):
        fake(mx.array(normal((4, 32), step)), timestamp=step)
    fake.freeze()
    fake.save("fake.safetensors")
    drawn["fake"] = np.array(fake(mx.array(normal((4, 32), 7)), timestamp=1.5))
    return said, drawn


def spun() -> str:
    """SpinQuant's own file, by the script that makes one; what its model goes on with."""
    script = next(HERE.parents[1].glob("examples/spinquant_ptq.py"))
    options = ["--data", "text.txt", "--out-dir", "spun", "--steps", "1", "--batches", "1", "--batch-size", "2"]
    options += ["--length", "16", "--activation-bits", "4", "--kv-bits", "8"]
    outcome = CliRunner().invoke(runpy.run_path(str(script))["command"], options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return continued("spun")


def continued(folder: str | Path) -> str:
    """What the likeliest tokens after a prompt are, by the script that reads SpinQuant's file."""
    script = next(HERE.parents[1].glob("examples/spinquant_sample.py"))
    options = ["--ckpt", str(folder), "--prompt", "def ", "--max-new-tokens", "12", "--temperature", "0"]
    outcome = CliRunner().invoke(runpy.run_path(str(script))["command"], options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def main() -> None:
    folder = HERE / version("mlxquant")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "embedded").mkdir(parents=True)
    with contextlib.chdir(folder):
        write_tiny_model(Path("embedded/mmdit-shapes.safetensors"))
        Path("text.txt").write_text(TEXT)
        command("train-gpt", "--out-dir", "embedded/gpt-python", *TRAINING, "--max-iters", 2, "--save-dtype", "float16")
        with tiny_assets(folder / "embedded"):
            said, drawn = write()
            said["spun"] = spun()
        Path("text.txt").unlink()
        for left in (*Path().rglob("training.safetensors"), *Path("steps/calib/activations").glob("*.png")):
            left.unlink()  # half a megabyte each: where a training would go on, and pictures that no command reads
        Path("expected.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
        np.savez_compressed("expected.npz", **drawn)


if __name__ == "__main__":
    main()
