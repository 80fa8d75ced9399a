"""The six steps of the explicit pipeline on a tiny model: what their tests begin with."""

from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.pipeline import ledger, samples

from support.command_line import succeed
from support.tiny_pictures import tiny_adapter


def files(folder):
    """The bytes of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use_tiny_model(patch, make=tiny_adapter, batch=None):
    """Until ``patch`` ends ``mmdit-shapes`` is what ``make()`` returns, drawn ``batch`` pictures at a time."""
    patch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": make()))
    if batch is not None:
        patch.setattr(MMDiTShapes, "batch", batch)


@contextmanager
def tiny_model(make=tiny_adapter):
    """The tiny model, without MLX's compiler, which takes longer than all else in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_model(patch, make)
        mx.disable_compile()
        yield patch
        mx.enable_compile()


def draw_in_process(folder, images, steps, cfg=2.0, adapter=None):
    """Trajectories of the first calibration prompts, without a command."""
    adapter = adapter or tiny_adapter()
    opened = samples.open_folder(adapter, adapter.prompts("calibration", images), steps, cfg, 0, folder)
    return samples.draw(adapter, opened)


def draw(folder, images, steps, *options):
    sizes = ("--num-images", images, "--num-steps", steps)
    return succeed("generate-calibration-data", "--model", "mmdit-shapes", *sizes, "--calib-dir", folder, *options)


def cache(folder, images, stride=1):
    return succeed("cache-adaround-data", "--calib-dir", folder, "--num-images", images, "--stride", stride)


def collect(folder, images, stride=1):
    return succeed("collect-layer-activations", "--calib-dir", folder, "--num-images", images, "--stride", stride)


def analyze(folder, *options):
    return succeed("analyze-activations", "--stats", folder / "activations" / "layer_statistics.json", *options)


def optimize(folder, out, *options):
    return succeed("adaround-optimize", "--cache-dir", folder / "adaround_cache", "--output-dir", out, *options)


def interrupt_writing(patch, after):
    """Let ``after`` npz files be written and raise KeyboardInterrupt at the next one."""
    write, left = ledger.write_npz, [after]

    def interrupted(path, arrays):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return write(path, arrays)

    patch.setattr(ledger, "write_npz", interrupted)
