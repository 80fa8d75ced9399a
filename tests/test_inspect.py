"""What inspect says of every kind of file, and of damaged ones."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.contents.arrays import list_arrays
from mlxquant.contents.layers import bits_per_weight
from mlxquant.contents.reader import read_contents
from mlxquant.contents.tables import brief, grouped, lines
from mlxquant.errors import ArtifactError
from mlxquant.files import checked

from support.command_line import fail, succeed
from support.contents_samples import dequantized, write_everything, write_json, write_mlx_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_everything(tmp_path_factory)


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def test_a_quantized_model_is_what_it_is(made):
    facts, table = succeed("inspect", made / "model")
    model = mq.load(made / "model")
    assert facts["kind"] == "quantized-model"
    assert {row["layer"]: (row["shape"], row["weight"]) for row in facts["layers"]} == {
        path: (list(layer.shape), str(layer.format)) for path, layer in model.layers.items()
    }
    assert {row["input"] for row in facts["layers"]} == {"A8 x2", "-"}
    assert (facts["bytes"], facts["bits_per_weight"]) == (
        model.size.model_bytes,
        pytest.approx(model.size.bits_per_weight),
    )
    assert facts["bits_per_quantized_weight"] == pytest.approx(model.size.bits_per_quantized_weight)
    assert facts["facts"]["recipe"]["name"] == "gptq-w4a8"
    assert facts["files"] == {"model.json": "sha256", "weights.safetensors": "sha256"}
    assert "gptq-w4a8" in table
    assert "multimodal_transformer_blocks.*.image_transformer_block.mlp.fc2" in table
    assert len(succeed("inspect", made / "model", "--each")[1].splitlines()) > len(table.splitlines())


def test_rotations_branches_and_divisors_are_told(tiny, tmp_path):
    model = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=2), "gptq+smoothquant+rotation+whitened4-w4a8")
    facts, table = succeed("inspect", model.save(tmp_path / "m"))
    assert facts["bits_per_weight"] == pytest.approx(model.size.bits_per_weight)
    assert facts["bits_per_quantized_weight"] == pytest.approx(model.size.bits_per_quantized_weight)
    told = {row["layer"]: row.get("besides", "") for row in facts["layers"]}
    for path, layer in model.layers.items():
        assert ("divided" in told[path], f"rotated by {layer.rotation}" in told[path]) == (
            "act_divisor" in layer,
            layer.rotation > 1,
        )
        assert ("rank 4 beside" in told[path]) == (layer.branch is not None)
    assert "besides" in table


def test_stored_layers_are_the_model_s_own(made):
    layers = {layer.path: layer for layer in read_contents(made / "model").layers}
    for path, layer in mq.load(made / "model").layers.items():
        assert np.array_equal(layers[path].weight(), np.array(layer.dequantized()))
        assert np.array_equal(layers[path].codes() + layer.format.zero_code, layer.codes())
        assert np.array_equal(layers[path].weight(3), np.array(layer.dequantized())[::3])


@pytest.mark.parametrize(
    ("path", "kind", "checks", "says"),
    [
        ("calib", "calibration-samples", 5, "also here: activations/, adaround_cache/"),
        ("calib/manifest.json", "calibration-samples", 5, "num_steps"),
        ("calib/adaround_cache", "adaround-cache", 3, "mm*__image"),
        ("calib/activations", "activation-statistics", 5, "readers"),
        ("calib/activations/quant_config.json", "quant-config", 2, "mean bits"),
        ("calib/activations/layer_temporal_analysis.json", "temporal-analysis", 1, "switchers"),
        ("weights", "adaround-weights", 3, "adaLN_modulation"),
        ("work/calibration/0000.safetensors", "calibration-batch", 1, "latents"),
        ("work/gptq-w4a8/head.safetensors", "stage", 1, "final_layer.linear"),
        ("calib/samples", "npz", 2, "*_*/x"),
        ("weights/weights/mm0.npz", "npz", 1, "weight_int"),
    ],
)  # fmt: skip
def test_every_kind_is_known(made, path, kind, checks, says):
    facts, table = succeed("inspect", made / path)
    assert (facts["kind"], len(facts["files"])) == (kind, checks)
    assert says in table


def test_a_layer_report_is_what_it_is():
    """Its ``stages`` are measurements along the model, not what was kept at each."""
    path = Path(__file__).parent / "releases/0.1.0/report/layers/static.json"
    report = json.loads(path.read_text())
    facts, table = succeed("inspect", path)
    assert (facts["kind"], facts["facts"]["model"]) == ("layer-report", "static")
    assert facts["facts"]["kept"] == {stage["stage"]: stage["kept"] for stage in report["decisions"]}
    assert [row["layer"] for row in facts["layers"]] == [layer["path"] for layer in report["layers"]]
    assert "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2" in table


def test_learned_weights_are_read_on_their_grid(made):
    for layer in read_contents(made / "weights").layers:
        with np.load(layer.parts["weight_int"].file) as file:
            codes, scale = file[f"{layer.path}__weight_int"], file[f"{layer.path}__scale"]
        assert np.array_equal(layer.codes(), codes)
        assert np.allclose(layer.weight(), codes * scale[:, None], rtol=1e-6, atol=0)
        assert layer.table() is None or layer.table()[2].tolist() == [8, 8]


@pytest.mark.parametrize(
    "path", ["model/weights.safetensors", "model/model.json", "calib/samples/0000_001.npz",
    "work/calibration/0000.safetensors",
             "calib/activations/quant_config.npz", "work/gptq-w4a8/head.safetensors"],
)  # fmt: skip
def test_one_flipped_bit_is_found(copied, path):
    file = copied / path
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    folder = {"model": "model", "calib": "calib", "work": path.removeprefix("work/")}[path.split("/")[0]]
    if "activations" in path:
        folder = "calib/activations/quant_config.json"
    said = fail("inspect", copied / ("work/" + folder if path.startswith("work") else folder), code=1)
    assert file.name.split(".")[0] in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "model.json", "a.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 40, b"[]"])
def test_what_is_no_such_file_is_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in fail("inspect", tmp_path / name, code=1)


def test_truncated_files_are_one_clear_error(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.zeros((64, 64))})
    np.savez(tmp_path / "b.npz", x=np.zeros((64, 64)))
    for name in ("a.safetensors", "b.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        assert "damaged" in fail("inspect", tmp_path / name, code=1)


def test_nothing_to_see_is_said(tmp_path):
    assert "no such file" in fail("inspect", tmp_path / "none", code=1)
    assert "holds nothing that mlxquant wrote" in fail("inspect", tmp_path, code=1)
    (tmp_path / "notes.txt").write_text("x")
    assert "expected a folder" in fail("inspect", tmp_path / "notes.txt", code=1)
    (tmp_path / "sub").mkdir()
    shutil.copy(write_model_json(tmp_path / "sub"), tmp_path / "sub" / "report.json")
    assert "it has sub/, name one of them" in fail("inspect", tmp_path, code=1)


def write_model_json(folder):
    path = folder / "model.json"
    write_json(path, {"kind": "quantized-model"})
    return path


def test_an_unfinished_folder_says_so(copied):
    manifest = copied / "calib" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["sha256"], data["files"]["images/0000.png"]
    manifest.write_text(
        checked.canonical({**data, "complete": False, "sha256": checked.digest({**data, "complete": False})})
    )
    facts, said = succeed("inspect", copied / "calib")
    assert "not finished: 3 files so far" in said
    assert len(facts["files"]) == 4


def test_checkpoints_of_other_tools_are_listed(tmp_path):
    arrays = write_mlx_checkpoint(tmp_path / "m")
    facts, table = succeed("inspect", tmp_path / "m")
    assert {row["layer"]: row["weight"] for row in facts["layers"]} == {"a": "w4-g32", "b": "w8-g64"}
    assert [(row["array"], row["shape"], row["dtype"]) for row in facts["arrays"]] == [
        ("norm.weight", [16, 128], "bfloat16")
    ]
    assert facts["bits_per_weight"] == pytest.approx(8 * sum(v.nbytes for v in arrays.values()) / (3 * 16 * 128))
    assert "nothing vouches for the values" in table
    contents = read_contents(tmp_path / "m")
    for layer, (bits, group) in zip(contents.layers, ((4, 32), (8, 64)), strict=True):
        assert np.allclose(layer.weight(), dequantized(arrays, layer.path, bits, group), atol=1e-6)
    norm = next(array for array in contents.arrays if array.name == "norm.weight")
    assert np.array_equal(norm.read(), np.array(arrays["norm.weight"].astype(mx.float32)))


def test_layers_on_an_unknown_grid_are_not_guessed(tmp_path):
    write_mlx_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    facts, table = succeed("inspect", tmp_path / "m")
    assert facts["layers"] == []
    assert "2 layers look packed" in table


def test_an_index_is_held_to_its_word(tmp_path):
    write_mlx_checkpoint(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    write_json(index, where)
    assert "says that lost is in model-00001" in fail("inspect", tmp_path / "m", code=1)


def test_dtypes_that_mlx_lacks_are_listed(tmp_path):
    entries = {
        "x": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]},
        "y": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [48, 53]},
    }
    head = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + np.arange(6.0).tobytes() + bytes(5))
    arrays, _ = list_arrays(path)
    assert [(a.name, a.dtype, a.shape, a.readable) for a in arrays] == [
        ("x", "float64", (2, 3), True),
        ("y", "float8_e4m3", (5,), False),
    ]
    assert np.array_equal(arrays[0].read(), np.arange(6.0).reshape(2, 3))
    with pytest.raises(ArtifactError, match="float8_e4m3, which can be listed and not read"):
        arrays[1].read()


def test_listing_reads_no_weights(tmp_path, monkeypatch):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.zeros((64, 64))})
    monkeypatch.setattr(np, "memmap", None)
    facts, _ = succeed("inspect", tmp_path / "a.safetensors")
    assert facts["arrays"] == [{"array": "x", "shape": [64, 64], "dtype": "float32", "bytes": 4 * 64 * 64}]


def test_plain_checkpoints_have_the_bits_of_their_dtype(tmp_path):
    mx.save_safetensors(
        str(tmp_path / "a.safetensors"), {"x.weight": mx.zeros((8, 8), mx.bfloat16), "y.weight": mx.zeros((8, 8))}
    )
    assert bits_per_weight(list_arrays(tmp_path / "a.safetensors")[0], []) == 24


def test_rows_that_differ_by_numbers_are_one():
    rows = [{"layer": f"blocks.{i}.mlp.fc{j}", "bits": 4, "error": 0.1 * (1 + i)} for i in range(3) for j in (1, 2)]
    assert grouped([*rows, {"layer": "head", "bits": 8, "error": 0.5}]) == [
        {"layer": "blocks.*.mlp.fc1", "count": 3, "bits": "4", "error": "0.1 to 0.3"},
        {"layer": "blocks.*.mlp.fc2", "count": 3, "bits": "4", "error": "0.1 to 0.3"},
        {"layer": "head", "count": 1, "bits": "8", "error": "0.5"},
    ]
    assert lines([{"a": "x", "b": 1.0}, {"a": "yyy", "b": 12.5}]) == ["a       b", "x       1", "yyy  12.5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0" * 64, "000000000000…"),
        ({"name": "gptq", "rules": [1]}, "gptq"),
        ({f"b{i}": "rtn" if i else "learned" for i in range(9)}, "8 x rtn, 1 x learned"),
        ({"steps": 4, "prompts": ["x" * 70], "others": ["y" * 70]}, "steps 4"),
        (list(range(100)), "100 entries"),
        (None, ""),
    ],
)  # fmt: skip
def test_facts_are_brief(value, text):
    assert brief(value) == text
