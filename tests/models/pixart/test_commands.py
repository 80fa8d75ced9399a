"""The commands on a tiny PixArt's folder, from its weights to quantized models, pictures and a report."""

import json

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.layers.tree import parameters
from mlxquant.models.pixart.adapter import PixArtAlpha

from support.command_line import fail, succeed
from support.pixart import write_pixart

pytestmark = pytest.mark.images
FEW = ("--num-prompts", 1, "--steps", 2)


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """MLX's compiler takes longer than all else here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pixart(tmp_path_factory.mktemp("hub"), "one block, 512", dtype=mx.float16)


def picture(path):
    return np.asarray(Image.open(path))


def test_a_folder_by_its_path_or_behind_the_name_of_its_model(folder):
    for reference in (folder, f"pixart-alpha@{folder}"):
        model = mq.load(reference)
        assert type(model.adapter) is PixArtAlpha
        assert (model.adapter.place, model.adapter.size) == (str(folder), (64, 64))
        assert {str(value.dtype) for value in parameters(model.adapter.module).values()} == {"mlx.core.float16"}
    assert "pixart-sigma of PixArtSigmaPipeline; name the place alone" in fail(
        "quantize", "--model", f"pixart-sigma@{folder}", "--recipe", "rtn-w8a8", "--out", "nowhere"
    )


def test_log_snr_scales_to_the_end(folder, tmp_path):
    """``python -m mlxquant.calibrate_snr --model pixart-alpha --abits 8 --wbits 8``, a picture, and the comparison."""
    snr = tmp_path / "snr"
    named = ("--model", f"pixart-alpha@{folder}")
    facts, _ = succeed("calibrate-snr", *named, "--abits", 8, "--wbits", 8, *FEW, "--save-path", snr)
    assert facts["recipe"] == "rtn+logsnr-w8a8"
    drawn = ("--prompt", "a cat", "--steps", 2, "--seed", 3)
    succeed("generate", "--model", snr, *drawn, "--output", tmp_path / "snr.png")
    succeed("generate", *named, *drawn, "--output", tmp_path / "exact.png")
    found, exact = (picture(tmp_path / f"{name}.png").astype(int) for name in ("snr", "exact"))
    assert found.shape == exact.shape == (64, 64, 3)
    assert 0 < np.abs(found - exact).mean() < 20
    again = ("--image", tmp_path / "exact.png", "--strength", 0.5, "--output", tmp_path / "again.png")
    succeed("generate", *named, *drawn, *again)
    assert 0 < np.abs(picture(tmp_path / "again.png").astype(int) - exact).mean() < 100
    report, _ = succeed("benchmark-final", snr, *named, *FEW, "--out", tmp_path / "bench")
    assert [result["name"] for result in report["results"]] == ["snr"]
    assert report["results"][0]["psnr_db"] > 20


def test_qronos_on_four_blocks(tmp_path):
    folder = write_pixart(tmp_path / "hub", "four blocks")
    succeed("quantize-qronos-4blocks", "--model", folder, *FEW, "--save-path", tmp_path / "qronos")
    layers = mq.load(tmp_path / "qronos").layers
    assert {path.split(".")[1] for path in layers} == set("0123")


def with_a_loud_channel(folder):
    """A channel of the text that stands out, as T5's do, and that all blocks read softly."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(path))
    mx.eval(arrays)
    loud = mx.array(np.where(np.arange(24) == 3, np.float32(30), np.float32(1)))
    for name, value in arrays.items():
        if name.startswith("caption_projection.linear_2."):
            arrays[name] = (value.T * loud).T
        elif ".attn2.to_k.weight" in name or ".attn2.to_v.weight" in name:
            arrays[name] = value / loud
    mx.save_safetensors(str(path), arrays)
    return folder


def test_the_six_steps(tmp_path):
    """And what all blocks read is divided once, before the first of them is rounded."""
    folder = with_a_loud_channel(write_pixart(tmp_path / "hub", "512"))
    named, calib, weights = ("--model", f"pixart-alpha@{folder}"), tmp_path / "calib", tmp_path / "weights"
    config = calib / "activations" / "quant_config.json"
    some = ("--num-images", 1, "--stride", 1)
    succeed("generate-calibration-data", *named, "--num-images", 1, "--num-steps", 2, "--calib-dir", calib)
    succeed("cache-adaround-data", *named, "--calib-dir", calib, *some)
    succeed("collect-layer-activations", *named, "--calib-dir", calib, *some)
    decided, _ = succeed("analyze-activations", *named, "--stats", calib / "activations" / "layer_statistics.json")
    assert decided["layers"] == 20
    divided = json.loads(config.read_text())["smoothquant"]
    assert (list(divided), decided["smoothed"]) == (["transformer_blocks.0.attn2.to_k"], 1)
    learned = ("--bits-w", 4, "--bits-a", 8, "--iters", 2, "--quant-config", config)
    succeed("adaround-optimize", *named, "--cache-dir", calib / "adaround_cache", "--output-dir", weights, *learned)
    shown = ("--prompt", "a cat", "--num-steps", 2, "--output-image", tmp_path / "a.png", "--save", tmp_path / "model")
    drawn, _ = succeed(
        "load-adaround-model", *named, "--adaround-output", weights, "--quant-config", config, *shown, "--compare"
    )
    assert min(model["psnr_db"] for model in drawn["models"].values()) > 25
    assert picture(tmp_path / "a.png").shape[2] == 3  # a sheet of four
    assert len(mq.load(tmp_path / "model").layers) == 20
