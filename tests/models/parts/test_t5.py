"""T5's encoder: what a mask closes, how much is in memory at once, and that float16 is never computed in.

``test_parity.py`` compares with transformers.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.models.parts import t5
from mlxquant.models.parts.t5 import buckets, encode_t5

from support.parts import T5, t5_tensors, write_component, write_json, write_t5

RNG = np.random.default_rng(2)


def encode(folder, ids, mask=None, dtype=mx.float32):
    mask = None if mask is None else mx.array(mask)
    return encode_t5(DiffusersFolder(str(folder)), "text_encoder", mx.array(ids), mask, dtype)


def random_ids(count, length):
    return RNG.integers(0, T5["vocab_size"], (count, length)).astype(np.int32)


def test_what_a_mask_closes_is_not_seen(tmp_path):
    write_t5(tmp_path, "text_encoder")
    ids, mask = random_ids(2, 30), np.zeros((2, 30), np.int32)
    mask[0, :11], mask[1, :23] = 1, 1
    padded, unmasked = encode(tmp_path, ids, mask), encode(tmp_path, ids)
    for row, length in enumerate((11, 23)):
        alone = encode(tmp_path, ids[row : row + 1, :length])
        np.testing.assert_allclose(padded[row, :length], alone[0], atol=1e-5)
        assert np.abs(np.array(unmasked[row, :length] - alone[0])).max() > 1e-2
    np.testing.assert_array_equal(encode(tmp_path, ids, mask.astype(bool)), padded)


def test_prompts_go_through_in_chunks(tmp_path, monkeypatch):
    """Of at least one, and of more where they are short."""
    write_t5(tmp_path, "text_encoder")
    ids = random_ids(5, 7)
    mask = (np.arange(7) < RNG.integers(1, 8, (5, 1))).astype(np.int32)
    whole = encode(tmp_path, ids, mask)
    for tokens in (1, 14):
        monkeypatch.setattr(t5, "TOKENS", tokens)
        np.testing.assert_allclose(encode(tmp_path, ids, mask), whole, atol=1e-5)
    assert encode(tmp_path, ids[:0], mask[:0]).shape == (0, 7, T5["d_model"])


@pytest.mark.parametrize("stored", [mx.float32, mx.float16])
def test_memory_is_that_of_a_layer(tmp_path, stored):
    config = {**T5, "d_model": 64, "d_kv": 32, "d_ff": 4096, "num_layers": 12}
    write_t5(tmp_path, "text_encoder", config, dtype=stored)
    of_a_layer = (4 * 64 * 128 + 3 * 64 * 4096) * 4
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    encode(tmp_path, random_ids(1, 4))
    assert of_a_layer < mx.get_peak_memory() - before < 1.4 * of_a_layer
    assert mx.get_active_memory() - before < of_a_layer / 2


def test_what_float16_does_not_hold(tmp_path):
    """Sums of the layers pass 65504 in a real T5; the result is as of float32, in float16."""
    tensors = t5_tensors(T5)
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= np.float32(3e5)
    write_component(tmp_path, "text_encoder", T5, tensors)
    ids = random_ids(1, 6)
    full, half, brain = (encode(tmp_path, ids, dtype=dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16))
    assert (full.dtype, half.dtype, brain.dtype) == (mx.float32, mx.float16, mx.bfloat16)
    np.testing.assert_array_equal(half, full.astype(mx.float16))
    np.testing.assert_allclose(brain.astype(mx.float32), full, atol=0.2)


def test_the_embedding_by_either_name_and_a_whole_t5(tmp_path):
    tensors = t5_tensors(T5)
    write_component(tmp_path, "text_encoder", T5, tensors)
    ids = random_ids(1, 9)
    before = encode(tmp_path, ids)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    whole = {**T5, "architectures": ["T5ForConditionalGeneration"]}
    write_component(tmp_path, "text_encoder", whole, {**tensors, "lm_head.weight": np.ones(3), "decoder.a": np.ones(2)})
    np.testing.assert_array_equal(encode(tmp_path, ids), before)


def test_buckets():
    """Half of them for keys behind the query; of each half, half for one distance each, the last from 128 on."""
    distance = np.arange(-600, 601)
    found = buckets(distance, 32, 128)
    by_distance = dict(zip(distance.tolist(), found.tolist(), strict=True))
    assert [by_distance[-n] for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [by_distance[n] for n in (1, 7, 8)] == [17, 23, 24]
    assert by_distance[-127] == by_distance[-128] == by_distance[-600] == 15
    assert by_distance[128] == by_distance[600] == 31
    assert (np.diff(found[distance <= 0]) <= 0).all()
    assert (np.diff(found[distance > 0]) >= 0).all()
    assert set(found.tolist()) == {*range(16), *range(17, 32)}


def test_ids_and_masks_that_do_not_fit(tmp_path):
    write_t5(tmp_path, "text_encoder")
    with pytest.raises(AdapterError, match="token id 160, and the text encoder's embedding has 160 rows"):
        encode(tmp_path, [[0, 160]])
    with pytest.raises(AdapterError, match=r"token ids of shape \(1, 2\) have a mask of shape \(1, 3\)"):
        encode(tmp_path, [[0, 1]], [[1, 1, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["UMT5EncoderModel"]}, "is of 'UMT5EncoderModel', expected T5EncoderModel or"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu', expected one of 'gated-gelu'"),
        ({"num_layers": 4}, "lack 9 of 39 tensors, such as encoder.block.3"),
        ({"num_layers": 2}, "have encoder.block.2"),
        ({"d_ff": 41}, "has shape (40, 24), and (41, 24) by config.json"),
        ({"d_model": "x"}, "d_model is 'x', expected a whole number"),
    ],
)
def test_what_is_said_of_files_that_do_not_fit(tmp_path, change, message):
    write_t5(tmp_path, "text_encoder")
    write_json(tmp_path / "text_encoder" / "config.json", {**T5, **change})
    with pytest.raises(ArtifactError) as error:
        encode(tmp_path, [[0]])
    assert message in str(error.value)
