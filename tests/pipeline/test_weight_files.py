"""The weight track's files: what the pipeline promises is in them, learned codes survive, and what does not fit is
refused.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.contents.reader import read_contents
from mlxquant.errors import ArtifactError
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.pipeline.ledger import Ledger
from mlxquant.pipeline.weight_files import CONFIG, KIND, WeightFiles
from mlxquant.sweep.store import StageResult

from support.tiny_pictures import tiny_adapter

FACTS = {
    "model": "mmdit-shapes",
    "source": "abc",
    "calibration": "def",
    "quant_config": None,
    "bits_w": 4,
    "recipe": {"name": "r"},
}
STREAM = "multimodal_transformer_blocks.0.image_transformer_block"
Q, FC2, ADALN = f"{STREAM}.attn.q_proj", f"{STREAM}.mlp.fc2", f"{STREAM}.adaLN_modulation.layers.1"
SIGMAS = np.array([0.25, 0.5, 1.0], np.float32)


@pytest.fixture(scope="module")
def model():
    """The tiny model, its blocks, and their layers."""
    adapter = tiny_adapter()
    blocks = adapter.blocks
    return (adapter, blocks, adapter.block_linears())


def table(width):
    rng = np.random.default_rng(width)
    shift = rng.normal(size=(3, width)).astype(np.float32) / 10
    return ActivationTable(SIGMAS, np.array([0.01, 0.02, 0.03], np.float32), shift, np.array([4, 6, 8], np.uint8))


def learned(adapter, stage, linears, digits=11):
    """A block's layers with codes that are not the nearest ones, as learning leaves them."""
    rng, layers = np.random.default_rng(0), {}
    for path, linear in linears.items():
        if not stage.owns(path):
            continue
        weight = np.array(linear.weight)
        divisor = np.linspace(1, 4, weight.shape[1]).astype(np.float32) if path.endswith("fc2") else None
        weight = weight if divisor is None else weight * divisor
        grid = fit_extremes(weight, WeightFormat(8 if adapter.role(path) == "modulation" else 4, digits=digits))
        codes = np.clip(
            grid.quantize(weight).astype(int) + rng.integers(-1, 2, weight.shape), 0, grid.format.levels - 1
        )
        codes[0, :2] = 0, grid.format.levels - 1  # both ends of the range
        bias, divided = linear.bias if "bias" in linear else None, None if divisor is None else mx.array(divisor)
        layers[path] = QuantizedLinear(codes.astype(np.uint8), grid, bias, divided)
        if adapter.role(path) != "modulation":
            layers[path].set_activations(table(weight.shape[1] if path.endswith("fc2") else 1), adapter.clock)
    facts = {"stage": stage.name, "kept": "learned", "error": 0.5, "errors": {"learned": 0.5, "rtn": 0.75}}
    return StageResult(layers, {**facts, "layers": {path: {} for path in layers}})


@pytest.fixture(scope="module")
def results(model):
    adapter, blocks, linears = model
    return {block.name: learned(adapter, block, linears) for block in blocks}


def opened(folder, model):
    _, blocks, linears = model
    return WeightFiles(Ledger.open(folder / CONFIG, KIND, FACTS, "adaround-optimize"), blocks, linears)


@pytest.fixture
def folder(tmp_path, model, results):
    """A finished folder."""
    files = opened(tmp_path, model)
    for block in model[1]:
        files.save(block, results[block.name])
    files.finish()
    return tmp_path


def read(folder, model):
    return WeightFiles.read(folder, model[1], model[2])


def test_scales_for_bfloat16_are_read_as_such(tmp_path, model):
    adapter, blocks, linears = model
    files = opened(tmp_path, model)
    kept = {block.name: learned(adapter, block, linears, 8) for block in blocks}
    for block in blocks:
        files.save(block, kept[block.name])
    files.finish()
    found = read(tmp_path, model)
    assert {format.digits for format in found.formats().values()} == {8}
    assert {layer.format.digits for layer in read_contents(tmp_path).layers} == {8}
    for block in blocks:
        again = found.load(block, adapter.clock).layers
        for path, layer in kept[block.name].layers.items():
            assert again[path].format == layer.format
            np.testing.assert_array_equal(again[path].grid().scales, layer.grid().scales)


def test_the_arrays_are_as_promised(folder, model, results):
    config = json.loads((folder / CONFIG).read_text())
    assert set(config["files"]) == {"weights/mm0.npz", "weights/mm1.npz"}
    assert config["blocks"]["mm0"]["errors"] == {"learned": 0.5, "rtn": 0.75}
    with np.load(folder / "weights" / "mm0.npz") as arrays:
        found = dict(arrays)
    layers = results[model[1][0].name].layers
    assert {name.rsplit("__", 1)[0] for name in found} == set(layers)
    for path, layer in layers.items():
        codes, scale = found[f"{path}__weight_int"], found[f"{path}__scale"]
        assert (codes.dtype, scale.dtype) == (np.int8, np.float32)
        assert (codes.shape, scale.shape) == (layer.shape, layer.shape[:1])
        assert (codes.min(), codes.max()) == (-layer.format.zero_code, layer.format.zero_code - 1)
        np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
        if layer.table is None:
            assert f"{path}__a_scale" not in found
        else:
            assert found[f"{path}__a_scale"].dtype == np.float32
            np.testing.assert_array_equal(found[f"{path}__a_scale"], layer.table.step)
    assert (found[f"{ADALN}__weight_int"].min(), found[f"{ADALN}__weight_int"].max()) == (-128, 127)
    assert found[f"{FC2}__a_shift"].shape == (3, 128)
    assert found[f"{FC2}__divisor"].dtype == np.float32


def test_the_learned_rounding_survives(folder, model, results):
    """An export that quantizes again loses it: rounding the loaded weight anew would change codes here, too."""
    adapter, blocks, linears = model
    files = read(folder, model)
    for block in blocks:
        loaded, saved = files.load(block, adapter.clock), results[block.name]
        assert loaded.facts == saved.facts
        assert set(loaded.layers) == set(saved.layers)
        for path, layer in loaded.layers.items():
            np.testing.assert_array_equal(layer.codes(), saved.layers[path].codes())
            with np.load(folder / files._file(block)) as arrays:
                codes, scale = arrays[f"{path}__weight_int"], arrays[f"{path}__scale"]
                divisor = arrays[f"{path}__divisor"] if f"{path}__divisor" in arrays else np.float32(1)
            np.testing.assert_array_equal(np.array(layer.dequantized()), scale[:, None] * codes.astype(np.float32))
            nearest = fit_extremes(np.array(linears[path].weight) * divisor, layer.format)
            assert (nearest.quantize(np.array(linears[path].weight) * divisor) != layer.codes()).mean() > 0.3


def test_loaded_layers_compute_what_the_saved_ones_did(folder, model, results):
    adapter, blocks, linears = model
    loaded, saved = read(folder, model).load(blocks[0], adapter.clock).layers, results[blocks[0].name].layers
    for path in (Q, FC2, ADALN):
        x = mx.random.normal((2, 5, linears[path].weight.shape[1]), key=mx.random.key(1))
        with adapter.clock.at(0.5):
            np.testing.assert_array_equal(np.array(loaded[path](x)), np.array(saved[path](x)))
    table = loaded[FC2].table
    for name in ("sigma", "step", "shift", "bits"):
        np.testing.assert_array_equal(getattr(table, name), getattr(saved[FC2].table, name))


def test_logarithmic_entries_survive(tmp_path, model):
    adapter, (block, *_), linears = model
    result = learned(adapter, block, linears)
    path, layer = next((path, layer) for path, layer in result.layers.items() if layer.table is not None)
    layer.set_activations(replace(layer.table, log=np.array([True, False, True])), adapter.clock)
    files = opened(tmp_path, model)
    files.save(block, result)
    read = files.load(block, adapter.clock).layers
    assert read[path].table.log.tolist() == [True, False, True]
    assert not any(other.table.log.any() for name, other in read.items() if name != path and other.table is not None)


def test_the_weight_is_what_the_codes_say_over_the_divisor(folder, model):
    adapter, blocks, linears = model
    layer = read(folder, model).load(blocks[0], adapter.clock).layers[FC2]
    layer.drop_activations()
    with np.load(folder / "weights" / "mm0.npz") as arrays:
        weight = arrays[f"{FC2}__scale"][:, None] * arrays[f"{FC2}__weight_int"] / arrays[f"{FC2}__divisor"]
    x = mx.random.normal((3, 128), key=mx.random.key(1))
    np.testing.assert_allclose(
        np.array(layer(x)), np.array(x) @ weight.T + np.array(linears[FC2].bias), rtol=1e-4, atol=1e-4
    )


def test_formats_and_blocks_are_known_without_loading(folder, model):
    adapter, blocks, linears = model
    files = read(folder, model)
    assert files.formats() == {path: WeightFormat(8 if adapter.role(path) == "modulation" else 4) for path in linears}
    assert [files.holds(stage) for stage in adapter.stages] == [False, *(True for _ in blocks), False]
    assert WeightFiles.facts(folder) == FACTS


def drop(name):
    return lambda arrays: arrays.pop(name)


def test_scales_too_small_for_float16_come_back(folder, model):
    files = read(folder, model)
    arrays = files.ledger.arrays("weights/mm0.npz")
    arrays[f"{Q}__scale"] = np.ldexp(arrays[f"{Q}__scale"], -30)
    files.ledger.add_npz("weights/mm0.npz", arrays)
    loaded = files.load(model[1][0], model[0].clock).layers[Q]
    assert loaded.scales.dtype == mx.float32
    np.testing.assert_array_equal(loaded.grid().scales[:, 0], arrays[f"{Q}__scale"])
    files.ledger.save(complete=True)
    contents = {layer.path: layer for layer in read_contents(folder).layers}
    assert contents[Q].bits_per_weight == loaded.bits_per_weight


def put(name, change):
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}__weight_int"), "'weight_int' is missing"),
        (drop(f"{Q}__scale"), "'scale' is missing"),
        (drop(f"{Q}__a_sigma"), "'a_sigma' is missing"),
        (put(f"{FC2}__weight_int", np.transpose), r"codes \(128, 32\).*\(32, 128\) codes of 4 bits"),
        (put(f"{Q}__scale", lambda v: v[:-1]), r"\(31,\) scales found.*\(32,\) scales expected"),
        (put(f"{Q}__weight_int", lambda v: v + np.int8(1)), "to 8 and .*codes of 4 bits"),
        (put(f"{Q}__weight_int", lambda v: v - np.int8(1)), "from -9 to"),
        (
            put(f"{Q}__scale", lambda v: v * np.float32(1.0001)),
            "more than the 11 significant bits of its format, w4, so",
        ),
        (put(f"{Q}__scale", lambda v: v * np.float32(np.nan)), "its scales are not positive"),
        (put(f"{Q}__a_scale", lambda v: -v), "every step must be positive"),
        (put(f"{FC2}__a_shift", lambda v: v[:, :5]), "shift of width 5 does not fit"),
        (put(f"{FC2}__divisor", lambda v: v[:5]), r"divisor of shape \(5,\) does not fit"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(folder, model, change, message):
    files = read(folder, model)
    arrays = files.ledger.arrays("weights/mm0.npz")
    change(arrays)
    files.ledger.add_npz("weights/mm0.npz", arrays)
    with pytest.raises(
        ArtifactError, match=rf"mm0\.npz: layer {STREAM}\.[a-z0-9_.]+: .*{message}.*--force --no-resume"
    ):
        files.load(model[1][0], model[0].clock)


def test_layers_of_another_model_are_refused(folder, model):
    adapter, blocks, linears = model
    files = read(folder, model)
    arrays = files.ledger.arrays("weights/mm0.npz")
    foreign = {name: value for name, value in arrays.items() if not name.startswith(Q)}
    for changed in (foreign, arrays | {"blocks.9.fc3__scale": np.ones(1, np.float32)}):
        files.ledger.add_npz("weights/mm0.npz", changed)
        with pytest.raises(
            ArtifactError,
            match=r"mm0\.npz: its layers are not the model's, such as \['(blocks\.9\.fc3|multi.*q_proj)'\]",
        ):
            files.load(blocks[0], adapter.clock)
    swapped = WeightFiles(files.ledger, (blocks[1], blocks[0]), linears)
    with pytest.raises(ArtifactError, match="its layers are not the model's"):
        swapped.load(blocks[0], adapter.clock)


def test_damaged_files_are_refused(folder, model):
    adapter, blocks, _ = model
    path = folder / "weights" / "mm1.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"mm1\.npz: sha256"):
        read(folder, model).load(blocks[1], adapter.clock)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"mm1\.npz: No such file"):
        read(folder, model).load(blocks[1], adapter.clock)


def test_missing_unfinished_and_foreign_folders_are_refused(folder, tmp_path, model, results):
    _, blocks, linears = model
    with pytest.raises(ArtifactError, match=r"none/config\.json: no such file; run 'mlxquant adaround-optimize"):
        read(tmp_path / "none", model)
    half = opened(tmp_path / "half", model)
    half.save(blocks[0], results[blocks[0].name])
    with pytest.raises(ArtifactError, match=r"not finished \(1 files so far\); run 'mlxquant adaround-optimize' again"):
        read(tmp_path / "half", model)
    with pytest.raises(ArtifactError, match="this model has 1 blocks"):
        WeightFiles.read(folder, blocks[:1], linears)


def test_a_half_done_folder_goes_on_where_it_was(tmp_path, folder, model, results):
    adapter, blocks, _ = model
    half = opened(tmp_path / "half", model)
    assert half.load(blocks[0], adapter.clock) is None
    half.save(blocks[0], results[blocks[0].name])
    half.checkpoint(blocks[1]).save({"alpha": mx.zeros(1)}, {"iteration": 5})
    again = opened(tmp_path / "half", model)
    assert again.load(blocks[1], adapter.clock) is None
    assert again.checkpoint(blocks[1]).load()[1] == {"iteration": 5}
    loaded = again.load(blocks[0], adapter.clock)
    again.save(blocks[1], replace(loaded, layers=results[blocks[1].name].layers, facts=results[blocks[1].name].facts))
    again.finish()
    for name in (CONFIG, "weights/mm0.npz", "weights/mm1.npz"):
        assert (tmp_path / "half" / name).read_bytes() == (folder / name).read_bytes()
    assert not list((tmp_path / "half").rglob("*.checkpoint.safetensors"))


def test_a_checkpoint_that_outlived_its_block_goes_in_the_end(tmp_path, model, results):
    files = opened(tmp_path, model)
    for block in model[1]:
        files.save(block, results[block.name])
        files.checkpoint(block).save({"alpha": mx.zeros(1)}, {})  # as if the run was killed before it could clear it
    files.finish()
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, "weights"}


def test_the_checkpoint_of_another_job_is_not_used(tmp_path, model):
    block = model[1][0]
    opened(tmp_path, model).checkpoint(block).save({"alpha": mx.zeros(1)}, {})
    ledger = Ledger.open(tmp_path / CONFIG, KIND, FACTS | {"bits_w": 3}, "adaround-optimize")
    assert WeightFiles(ledger, model[1], model[2]).checkpoint(block).load() is None


def test_a_damaged_checkpoint_says_how_to_start_over(tmp_path, model):
    """And that works: nothing of it is left then."""
    files, block = opened(tmp_path, model), model[1][0]
    files.checkpoint(block).save({"alpha": mx.zeros(64)}, {})
    path = tmp_path / "mm0.checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"checksum does not match .*pass --no-resume, or remove the file"):
        files.checkpoint(block).load()
    files.clear_checkpoints()
    assert files.checkpoint(block).load() is None


def changed(layer, **facts):
    """A layer of another structure in the place of one; its values do not matter."""
    return QuantizedLinear.blank({**layer.facts, **facts}, None)


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"rotation": 4}, "a rotation"),
        ({"rank": 2}, "a low-rank branch"),
        ({"format": WeightFormat(4, 32).to_dict()}, "the format w4-g32-sym"),
        ({"format": WeightFormat(4, symmetric=False).to_dict()}, "the format w4-asym"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(tmp_path, model, facts, what):
    """Left out silently, the layer would come back as another one."""
    adapter, (block, *_), linears = model
    result = learned(adapter, block, linears)
    result.layers[Q] = changed(result.layers[Q], **facts)
    files = opened(tmp_path, model)
    with pytest.raises(
        ArtifactError, match=rf"mm0\.npz: layer {Q} has {what}, .* expected .*; use 'mlxquant quantize'"
    ):
        files.save(block, result)
    assert not (tmp_path / "weights").exists()
