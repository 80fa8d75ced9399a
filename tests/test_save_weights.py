"""``mlxquant save-weights``: what is written is what the model computes with, and visualize draws it."""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.files.checked import read_tensors
from mlxquant.qat.convert import quantizing_points
from mlxquant.qat.folders import quantized_gpt
from mlxquant.qat.integer import quantizing_weights
from mlxquant.save_weights import choose_device

from support.command_line import fail, succeed
from support.small_gpt import SMALL, text_file

OPTIONS = [
    "--linear_variant_attn=quantized_linear", "--linear_variant_mlp_up=quantized_linear",
    "--quantize_linear_method=affine_quant",
    "--quantize_linear_mlp_up_method=ternary_quant", "--quantize_mlp_act", "--quantize_mlp_act_bits=4",
    "--store_activations",
    "--quantization_warmup_iters=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    succeed("train-gpt", "--data", text_file(folder), "--out_dir", folder / "out", *SMALL, "--max_iters", 3, *OPTIONS)
    succeed("train-gpt", "--data", text_file(folder), "--out_dir", folder / "plain", *SMALL, "--max_iters", 1)
    return folder


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    return {name: np.array(value) for name, value in read_tensors(path, "quantized-values")[0].items()}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_file_has_the_integers_behind_every_quantized_tensor(trained, tmp_path, kind):
    facts, _ = succeed(
        "save-weights", "--out_dir", trained / "out", "--file_name", tmp_path / "values", "--file_type", kind
    )
    values = read(tmp_path / f"values.{kind}")
    model, _, _ = quantized_gpt(trained / "out")
    expected = {}
    for path, layer in quantizing_weights(model).items():
        weight = np.array(layer.rounded(mx.float32))
        names = [f"{path}.{part}" for part in "qkv"] if path.endswith("c_attn") else [path]
        expected |= dict(zip(names, np.split(weight, len(names)), strict=True))
    assert set(facts["tensors"]) == set(expected) | set(quantizing_points(model))
    assert set(values) == {
        f"{name}.{part}" for name in facts["tensors"] for part in ("codes", "scale", "zero_point", "bits")
    }
    for name in facts["tensors"]:
        codes, bits = values[f"{name}.codes"], int(values[f"{name}.bits"])
        assert codes.dtype == np.int8
        assert -(2 ** (bits - 1)) <= codes.min() <= codes.max() <= 2 ** (bits - 1) - 1
        found = values[f"{name}.scale"] * (codes.astype(np.float64) - values[f"{name}.zero_point"])
        if name in expected:
            np.testing.assert_allclose(found, expected[name], atol=1e-6)
            assert set(np.unique(codes)) == {-1, 0, 1} or not name.endswith("c_fc")
        else:
            assert bits == 4
            assert codes.shape[:2] == (4, 16)


def test_two_runs_write_the_same_bytes_and_files_are_kept(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("npz", "safetensors"):
        for name in ("one", f"two.{kind}"):
            succeed(
                "save-weights",
                "--out-dir",
                trained / "out",
                "--file-name",
                name,
                "--file-type",
                kind,
                "--device",
                "cpu",
            )
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    assert "--force" in fail("save-weights", "--out-dir", trained / "out", "--file-name", "one")
    succeed("save-weights", "--out-dir", trained / "out", "--file-name", "one", "--force")


def test_what_cannot_be_written_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fail("save-weights", "--out_dir", trained / "out", "--file_type=pkl")
    assert "a pickle runs whatever code is in it" in said
    said = fail("save-weights", "--out_dir", trained / "out", "--file_name", "quantized_data.pkl")
    assert "a pickle (.pkl) runs whatever code is in it" in said
    assert "write --file-type npz or safetensors" in said
    assert "trained without quantization" in fail("save-weights", "--out_dir", trained / "plain")
    assert "config.json" in fail("save-weights", "--out_dir", tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_cuda_is_the_gpu_of_an_mlx_that_was_built_for_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    said = fail("save-weights", "--out_dir", trained / "out", "--device=cuda", "--file-name", tmp_path / "values")
    assert "--device cuda: this MLX was not built for CUDA; leave it out" in said
    assert not (tmp_path / "values.npz").exists()
    chosen = []
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    for name in ("cuda", "gpu", "cpu"):
        choose_device(name)
    assert chosen == [mx.Device(mx.gpu), mx.Device(mx.gpu), mx.Device(mx.cpu)]


@pytest.mark.parametrize("there", [False, True], ids=["missing", "there"])
def test_visualize_and_inspect_say_of_a_pickle_what_is_wrong_with_it(tmp_path, there):
    file = tmp_path / "quantized_data.pkl"
    if there:
        file.write_bytes(b"\x80\x04K\x01.")
    said = "a pickle (.pkl) runs whatever code is in it when it is read; mlxquant has none, name a .safetensors, .npz"
    assert said in fail("visualize", "--file_name", file, "--image_folder", tmp_path / "v", "--weight=all")
    assert said in fail("inspect", file)
    assert "a pickle" in fail("perplexity", "--model", file)


@pytest.mark.parametrize(("kind", "graph"), [("npz", "histogram"), ("safetensors", "matrix")])
def test_visualize_draws_values_and_codes(trained, tmp_path, kind, graph):
    succeed("save-weights", "--out_dir", trained / "out", "--file_name", tmp_path / "values", "--file_type", kind)
    file = tmp_path / f"values.{kind}"
    facts, _ = succeed(
        "visualize", "--file_name", file, "--weight", "*h.0.*[cn]_*", "--graph", graph, "--image_folder", tmp_path / "v"
    )
    names = [tensor["name"] for tensor in facts["tensors"]]
    assert len(names) == 2 * (3 + 1 + 1 + 2)
    assert {
        "model.h.0.attn.c_attn.k.codes",
        "model.h.0.mlp.c_fc.values",
        "model.h.0.mlp.activation_output.codes",
    } <= set(names)
    for name in facts["files"]:
        with Image.open(tmp_path / "v" / name) as image:
            assert np.asarray(image.convert("RGB")).std() > 5
    assert "name one file" in fail("visualize", file, "--file-name", file, "--image-folder", tmp_path / "w", code=2)
    assert "name a file" in fail("visualize", "--image-folder", tmp_path / "w", code=2)
