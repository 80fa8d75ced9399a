"""CLIP's text encoders: which state is the pooled one, whose names are read, and what is said of files that do not fit.

``test_parity.py`` compares with transformers.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.models.parts.clip import load_clip

from support.parts import CLIP_G, CLIP_L, SIZE, clip_tensors, random_ids, write_clip, write_component, write_json


def load(folder, dtype=mx.float32):
    return load_clip(DiffusersFolder(str(folder)), "text_encoder", dtype)


def test_the_pooled_state_is_that_of_the_first_end_token(tmp_path):
    """In old configs, whose end token is none of CLIP's, it is the highest id; that is the end token."""
    ids = random_ids(4, 20)
    ends = (np.array(ids) == SIZE - 1).argmax(axis=1)
    for config in (CLIP_L, {**CLIP_L, "eos_token_id": SIZE - 1}):
        write_clip(tmp_path, "text_encoder", config)
        said = load(tmp_path)(ids)
        np.testing.assert_array_equal(said.pooled, np.array(said.last)[np.arange(4), ends])
    write_clip(tmp_path, "text_encoder", {**CLIP_L, "eos_token_id": 5})
    named = mx.array(np.where(np.arange(20) % 7 == 6, 5, np.minimum(ids, SIZE - 2)).astype(np.int32))
    said = load(tmp_path)(named)
    np.testing.assert_array_equal(said.pooled, said.last[:, np.array(named)[0].tolist().index(5)])


def test_the_projection_is_of_the_pooled_state_alone(tmp_path):
    plain = {**CLIP_G, "architectures": ["CLIPTextModel"]}
    tensors = clip_tensors(CLIP_G)
    write_component(tmp_path, "text_encoder", plain, tensors)
    without = load(tmp_path)(random_ids(2, 9))
    mx.eval(without.last, without.pooled)  # before the file is another
    write_component(tmp_path, "text_encoder", CLIP_G, tensors)
    said = load(tmp_path)(random_ids(2, 9))
    np.testing.assert_array_equal(said.last, without.last)
    np.testing.assert_allclose(said.pooled, np.array(without.pooled) @ tensors["text_projection.weight"].T, atol=1e-5)


def test_names_of_transformers_5(tmp_path):
    """A CLIPTextModel's have no prefix there."""
    tensors = clip_tensors(CLIP_L)
    write_component(tmp_path, "text_encoder", CLIP_L, tensors)
    before = np.array(load(tmp_path)(random_ids(1, 5)).last)
    bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    write_component(tmp_path, "text_encoder", CLIP_L, bare)
    np.testing.assert_array_equal(load(tmp_path)(random_ids(1, 5)).last, before)


def test_half_precision_and_what_a_file_has_besides(tmp_path):
    tensors = {**clip_tensors(CLIP_L), "logit_scale": np.float32(1), "text_model.embeddings.position_ids": np.ones(1)}
    write_component(tmp_path, "text_encoder", CLIP_L, tensors, dtype=mx.float16)
    half, full = (load(tmp_path, dtype)(random_ids(2, 11)) for dtype in (mx.float16, mx.float32))
    assert (half.last.dtype, half.pooled.dtype, full.last.dtype) == (mx.float16, mx.float16, mx.float32)
    np.testing.assert_allclose(half.last.astype(mx.float32), full.last, atol=0.03)


def test_ids_that_the_embedding_has_no_row_for(tmp_path):
    write_clip(tmp_path, "text_encoder")
    model = load(tmp_path)
    with pytest.raises(AdapterError, match=f"token id {SIZE}, and the text encoder's embedding has {SIZE} rows"):
        model(mx.array([[1, SIZE, 2]]))
    with pytest.raises(AdapterError, match="token id -1, and the text encoder's embedding"):
        model(mx.array([[1, -1, 2]]))
    with pytest.raises(AdapterError, match="78 tokens, and the text encoder has 77 positions"):
        model(mx.zeros((1, 78), dtype=mx.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["CLIPModel"]}, "is of 'CLIPModel', expected CLIPTextModel or CLIPTextModelWithProjection"),
        ({"architectures": None}, "names no class"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish', expected one of 'quick_gelu', 'gelu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
        ({"num_attention_heads": 5}, "5 heads of 32 channels"),
        ({"vocab_size": SIZE + 1}, "token_embedding.weight has shape"),
        ({"num_hidden_layers": 4}, "lack 16 of 68 tensors, such as text_model.encoder.layers.3"),
        ({"num_hidden_layers": 2}, "which a model of this config.json has not"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "lack 1 of 53 tensors, such as text_projection.weight"),
    ],
)
def test_what_is_said_of_files_that_do_not_fit(tmp_path, change, message):
    write_component(tmp_path, "text_encoder", CLIP_L, clip_tensors(CLIP_L))
    write_json(tmp_path / "text_encoder" / "config.json", {**CLIP_L, **change})
    with pytest.raises(ArtifactError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert message in str(error.value)


def test_weights_that_are_coded(tmp_path):
    tensors = clip_tensors(CLIP_L)
    arrays = {name: mx.array(value) for name, value in tensors.items()}
    arrays["text_model.final_layer_norm.bias"] = mx.zeros((32,), dtype=mx.int32)
    write_component(tmp_path, "text_encoder", CLIP_L, tensors)
    mx.save_safetensors(str(tmp_path / "text_encoder" / "model.safetensors"), arrays)
    with pytest.raises(ArtifactError, match=r"final_layer_norm.bias is int32, so the file is quantized already"):
        load(tmp_path)
