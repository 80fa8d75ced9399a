"""``mlxquant save-weights``: the integers behind a GPT that learned quantized, as a file of arrays."""

from __future__ import annotations

from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from .commandline.console import Command, during_command, result, say
from .commandline.options import PATH, UNDERSCORES, option, verbose_option
from .errors import ArtifactError, RecipeError
from .files.atomic import atomic_file
from .files.checked import write_tensors
from .files.lock import locked
from .files.pickles import refuse_pickle
from .qat.folders import quantized_gpt
from .qat.integer import quantized_values

KIND = "quantized-values"


@click.command("save-weights", cls=Command, context_settings=UNDERSCORES)
@option("--out-dir", type=PATH, default="out", help="A folder that train-gpt wrote.")
@option("--file-name", default="quantized_weights", help="The file to write, with or without its suffix.")
@option("--file-type", type=click.Choice(["npz", "safetensors", "pkl"]), default="npz", help="pkl is refused.")
@option("--device", type=click.Choice(["cpu", "gpu", "cuda"]), help="Where to compute.  [default: MLX's]")
@option("--force", is_flag=True, help="Replace an existing file.")
@verbose_option
def command(out_dir: Path, file_name: str, file_type: str, device: str | None, force: bool) -> None:
    """Write the integers behind a GPT's weights.

    Codes (int8), scales and zero points of every quantized weight, and of the activations that were stored. A value is
    scale * (codes - zero_point). 'mlxquant visualize FILE' draws them.
    """
    if file_type == "pkl":
        raise RecipeError(
            "a pickle runs whatever code is in it when it is read; write --file-type npz or safetensors instead"
        )
    refuse_pickle(Path(file_name), "write --file-type npz or safetensors")
    path = Path(file_name) if file_name.endswith(f".{file_type}") else Path(f"{file_name}.{file_type}")
    during_command(locked(path))
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists; choose another --file-name or pass --force to replace it")
    if device is not None:
        choose_device(device)
    model, _, facts = quantized_gpt(out_dir)
    values = quantized_values(model)
    if not values:
        raise RecipeError(
            f"{out_dir} was trained without quantization; train it with --linear-variant-attn quantized_linear, for"
            " instance"
        )
    if file_type == "npz":
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{name: np.array(value) for name, value in values.items()})
    else:
        write_tensors(path, KIND, values, {"facts": {"quantization": facts["quantization"], "text": facts["text"]}})
    tensors = sorted(name.removesuffix(".codes") for name in values if name.endswith(".codes"))
    say(f"{path}: {len(tensors)} quantized tensors")
    result({"file": str(path), "tensors": tensors, "bytes": path.stat().st_size})


def choose_device(name: str) -> None:
    """Have MLX compute there; "cuda" is its gpu where it was built for CUDA. Raises RecipeError where there is none."""
    if name == "cuda" and not mx.cuda.is_available():
        raise RecipeError(
            "--device cuda: this MLX was not built for CUDA; leave it out for the fastest that there is, or pass gpu"
            " (Metal) or cpu"
        )
    device = mx.Device(mx.cpu if name == "cpu" else mx.gpu)
    if not mx.is_available(device):
        raise RecipeError(f"--device {name}: this machine has none that MLX can use; leave it out")
    mx.set_default_device(device)


if __name__ == "__main__":
    command()
