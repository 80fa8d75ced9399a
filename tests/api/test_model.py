"""What a notebook does: quantize, save, load, compare; the loaded model draws the same picture, bit for bit."""

import hashlib
import json
import types

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import mlxquant as mq
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError
from mlxquant.files import checked
from mlxquant.files import parameters as parameter_files
from mlxquant.files.array_memory import ArrayMemory
from mlxquant.files.checked import read_json, read_tensors, write_json, write_tensors
from mlxquant.files.parameters import _fits_float16
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.sizes import planned_bytes
from mlxquant.layers.tree import set_module

PROMPT = "a large red circle at left on white background"


@pytest.fixture(scope="module")
def quantized(embedded):
    return mq.quantize(embedded, mq.calibrate(embedded, prompts=1, steps=2), "rtn-w4a8")


def test_saved_model_draws_the_same_picture(quantized, tmp_path):
    quantized.save(tmp_path / "q")
    again = mq.load(tmp_path / "q")
    prompts = [mq.Prompt(7, PROMPT)]
    np.testing.assert_array_equal(again.images(prompts, steps=3), quantized.images(prompts, steps=3))
    assert type(again) is mq.QuantizedModel
    assert mq.QuantizedModel.load(tmp_path / "q").facts == again.facts
    assert again.facts == json.loads(json.dumps(quantized.facts))
    again.save(tmp_path / "again")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_stored_size_is_what_the_formats_imply(quantized, tmp_path, embedded):
    size = quantized.size
    quantized.save(tmp_path / "q")
    file = (tmp_path / "q" / "weights.safetensors").stat().st_size
    header = 250 * len(quantized._arrays())  # names, shapes and offsets
    assert size.model_bytes <= file <= size.model_bytes + header
    implied = sum(8 * planned_bytes(layer.format, layer.shape) for layer in quantized.layers.values())
    weights = sum(np.prod(layer.shape) for layer in quantized.layers.values())
    assert size.bits_per_quantized_weight == pytest.approx(implied / weights)
    main = [layer for layer in quantized.layers.values() if layer.table is not None]
    assert sum(layer.nbytes for layer in main) * 8 < 4.13 * sum(np.prod(layer.shape) for layer in main)
    assert size.model_bytes < 2.7e6 < 7e6 < sum(v.nbytes for v in _parameters(embedded)) / 2


def _parameters(model):
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.adapter.module.parameters())]


@pytest.mark.parametrize("steps", [2, 5])
def test_runs_at_step_counts_it_was_not_calibrated_for(quantized, steps):
    image = quantized.generate(PROMPT, seed=1, steps=steps)
    assert image.size == (32, 32)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_folders_are_refused(quantized, tmp_path, name, damage):
    quantized.save(tmp_path / "q")
    path = tmp_path / "q" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        mq.load(tmp_path / "q")


def test_whole_weights_of_another_model_are_refused(quantized, tmp_path):
    quantized.save(tmp_path / "q")
    path = tmp_path / "q" / "weights.safetensors"
    arrays, header = read_tensors(path, "weights")
    name = next(iter(arrays))
    write_tensors(path, "weights", {**arrays, name: arrays[name] + 1}, {"model": header["model"]})
    read_tensors(path, "weights")  # the file itself is in order
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: checksum does not match"):
        mq.load(tmp_path / "q")


@pytest.mark.parametrize(
    "files", [{"weights.safetensors": ""}, {"weights.safetensors": None}, {}, {"../q/weights.safetensors": "0" * 64}]
)
def test_weights_that_model_json_does_not_vouch_for_are_refused(quantized, tmp_path, files):
    quantized.save(tmp_path / "q")
    path = tmp_path / "q" / "model.json"
    facts = {k: v for k, v in read_json(path, "quantized-model").items() if k not in ("kind", "version")}
    write_json(path, "quantized-model", {**facts, "files": files})
    with pytest.raises(ArtifactError):
        mq.load(tmp_path / "q")


class CountingHash:
    """sha256 that counts the bytes it is given."""

    def __init__(self, counts, data=b""):
        self._counts, self._hash = counts, hashlib.sha256()
        self.update(data)

    def update(self, data):
        self._counts.append(len(data))
        self._hash.update(data)

    def hexdigest(self):
        return self._hash.hexdigest()


def test_loading_hashes_every_byte_once(quantized, tmp_path, monkeypatch):
    quantized.save(tmp_path / "q")
    size = sum(path.stat().st_size for path in (tmp_path / "q").iterdir())
    counts = []
    counting = types.SimpleNamespace(sha256=lambda data=b"": CountingHash(counts, data), file_digest=None)
    monkeypatch.setattr(checked, "hashlib", counting)
    mq.load(tmp_path / "q")
    assert size * 0.99 < sum(counts) < size * 1.01  # model.json is hashed without its checksum


def test_half_precision_models_come_back_in_half_precision(tiny, tmp_path):
    """Also the biases of quantized layers, which are stored as they are."""
    layers = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=1), "rtn-w4a8").layers
    half = mq.QuantizedModel(tiny.clone(), {"recipe": {"name": "x"}})
    for path, layer in layers.items():
        bias = layer.bias.astype(mx.float16) if "bias" in layer else None
        set_module(half.adapter.module, path, QuantizedLinear(layer.codes(), layer.grid(), bias))
    half.save(tmp_path / "q")
    again = mq.load(tmp_path / "q")
    assert {layer.bias.dtype for layer in again.layers.values() if "bias" in layer} == {mx.float16}
    again.save(tmp_path / "again")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_saving_looks_for_what_fits_half_precision_once(tiny, tmp_path, monkeypatch):
    model = mq.quantize(tiny, mq.calibrate(tiny, prompts=1, steps=1), "rtn-w4a8")
    asked = []
    fits = _fits_float16
    monkeypatch.setattr(
        parameter_files, "_fits_float16", ArrayMemory(lambda value: asked.append(value.shape) or fits(value))
    )
    model.save(tmp_path / "q")
    count = len(asked)
    assert model.size.model_bytes > 0
    assert len(asked) == count > 0


@pytest.mark.parametrize("file", ["mflux_model.json", "pipeline.json", ""])
def test_pipelines_of_mflux_are_no_models_here_and_the_error_says_where_they_go(file, tmp_path):
    if file:
        (tmp_path / file).write_text("{}")
    with pytest.raises(
        AdapterError, match="is a pipeline of mflux, which 'mlxquant quantize', 'export' and 'generate'"
    ):
        mq.load(tmp_path if file else "mflux:dev")


def test_unknown_models_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="unknown model 'sd9'"):
        mq.load("sd9")
    with pytest.raises(AdapterError, match="none': neither a folder, nor a hub id"):
        mq.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="holds no model: expected a folder written by 'mlxquant quantize'"):
        mq.load(tmp_path)


def test_existing_folder_is_kept_without_force(quantized, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("precious")
    for force in (False, True):
        with pytest.raises(ArtifactError):
            quantized.save(tmp_path / "q", force=force)
    assert (tmp_path / "q" / "mine").read_text() == "precious"
    (tmp_path / "q" / "mine").unlink()
    quantized.save(tmp_path / "q", force=True)
    quantized.save(tmp_path / "q", force=True)
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["model.json", "weights.safetensors"]


@pytest.mark.parametrize("key", ["files", "layers", "model"])
def test_incomplete_model_json_is_refused(quantized, tmp_path, key):
    quantized.save(tmp_path / "q")
    path = tmp_path / "q" / "model.json"
    facts = {k: v for k, v in read_json(path, "quantized-model").items() if k not in (key, "kind", "version")}
    write_json(path, "quantized-model", facts)
    with pytest.raises(ArtifactError, match=r"model\.json: incomplete"):
        mq.load(tmp_path / "q")


def test_no_prompts_are_refused(quantized):
    with pytest.raises(CalibrationError, match="no prompts"):
        quantized.images([])


def test_labels_hold_no_missing_glyphs(embedded, quantized):
    font = ImageFont.load_default(15)
    missing = bytes(font.getmask("\ue000"))
    comparison = mq.compare(embedded, {"a-very-long-name-of-a-recipe-w4a8": quantized}, PROMPT, steps=1)
    texts = []
    draw = ImageDraw.ImageDraw.text
    try:
        ImageDraw.ImageDraw.text = lambda self, at, text, *rest: texts.append(text) or draw(self, at, text, *rest)
        comparison.draw()
    finally:
        ImageDraw.ImageDraw.text = draw
    assert len(texts) > 8
    assert not [c for text in texts for c in text if c != " " and bytes(font.getmask(c)) == missing]


def test_comparison_measures_and_draws(embedded, quantized, tmp_path):
    comparison = mq.compare(embedded, quantized, PROMPT, seed=7, steps=3)
    assert comparison.psnr_db["quantized"].shape == (1,)
    assert 0 < comparison.psnr_db["quantized"][0] < 100
    assert set(comparison.accuracy) == {"FP", "quantized"}
    with Image.open(comparison.save(tmp_path / "c.png")) as picture:
        assert picture.width > 3 * 144
        assert picture.height > 144
    with pytest.raises(ArtifactError, match="check the path"):
        comparison.save(tmp_path / "none" / "c.png")


def test_package_functions_survive_their_modules():
    import mlxquant.quantize

    assert callable(mq.quantize)
    assert mlxquant.quantize is mq.quantize
