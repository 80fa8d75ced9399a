"""CLIP on random weights and a toy tokenizer; its equality with transformers is tested in ``public``."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError, NumericsError
from mlxquant.metrics import clip
from mlxquant.metrics.clip_scores import ClipIqa, ClipScore
from mlxquant.metrics.images import shortest_side

from support.random_weights import random_tensors

SIZES = clip.Sizes(
    vision=clip.Tower("vision_model.", 128, 96, 2, 10),
    text=clip.Tower("text_model.", 64, 80, 2, 12),
    patch=14,
    words=40,
    joint=24,
)
TENSORS = {
    name: mx.array(value)
    for name, value in random_tensors(
        clip.shapes(SIZES) | {"text_model.embeddings.position_embedding.weight": (12, 64)}
    ).items()
}
IMAGES = np.random.default_rng(0).random((3, 20, 30, 3))


def tokenize(text):
    return [38, *(ord(letter) % 38 for letter in text[:10]), 39]


@pytest.fixture(scope="module")
def network():
    return clip.Clip(TENSORS, "test", tokenize)


def test_sizes_are_read_from_shapes(network):
    assert network.sizes == SIZES
    assert network.sizes.side == 42


def test_embeddings_have_unit_length(network):
    for found in (network.encode_texts(["a", "cat", ""]), network.encode_images(IMAGES, shortest_side)):
        assert found.shape == (3, 24)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(network):
    """Padding after the end changes nothing: attention is causal."""
    np.testing.assert_allclose(
        network.encode_texts(["cat", "a long text"])[0], network.encode_texts(["cat"])[0], rtol=1e-4, atol=1e-6
    )


def test_score_is_of_matched_pairs(network):
    prompts = ["cat", "dog", "a bird"]
    pictures, texts = network.encode_images(IMAGES, shortest_side), network.encode_texts(prompts)
    found = ClipScore(network)(IMAGES, prompts)
    np.testing.assert_allclose(found, 100 * np.maximum(np.diag(pictures @ texts.T), 0), rtol=1e-4)
    with pytest.raises(NumericsError, match="3 pictures and 2 prompts"):
        ClipScore(network)(IMAGES, prompts[:2])


def test_quality_is_the_odds_of_a_good_photo(network):
    pictures = network.encode_images(IMAGES, shortest_side)
    good, bad = np.exp(100 * pictures.astype(np.float64) @ network.encode_texts(["Good photo.", "Bad photo."]).T).T
    np.testing.assert_allclose(ClipIqa(network)(IMAGES), good / (good + bad), rtol=1e-3)


def test_pictures_alone():
    vision = {name: value for name, value in TENSORS.items() if not name.startswith("text")}
    network = clip.Clip(vision, "test")
    np.testing.assert_array_equal(
        network.encode_images(IMAGES, shortest_side),
        clip.Clip(TENSORS, "test", tokenize).encode_images(IMAGES, shortest_side),
    )
    with pytest.raises(AdapterError, match="without a tokenizer"):
        network.encode_texts(["cat"])


def test_another_models_file_is_refused():
    with pytest.raises(ArtifactError, match=r"x\.bin: not a CLIP model"):
        clip.Clip({"weight": mx.zeros((2, 2))}, "x.bin")
    with pytest.raises(ArtifactError, match=r"x\.bin: not a CLIP model"):
        clip.Clip(TENSORS | {"vision_model.embeddings.position_embedding.weight": mx.zeros(7)}, "x.bin")
    lacking = {name: value for name, value in TENSORS.items() if name != "vision_model.encoder.layers.1.mlp.fc2.bias"}
    with pytest.raises(ArtifactError, match=r"x.bin: 1 of .* such as vision_model.encoder.layers.1.mlp.fc2.bias"):
        clip.Clip(lacking, "x.bin", tokenize)


def normed(name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.array(TENSORS[f"{name}.weight"]) + np.array(TENSORS[f"{name}.bias"])


def mapped(name, x):
    return x @ np.array(TENSORS[f"{name}.weight"]).T + np.array(TENSORS[f"{name}.bias"])


def encoded(tower, x, causal):
    """A transformer on one sequence [N,width], in float64, head by head."""
    for index in range(tower.depth):
        layer = f"{tower.prefix}encoder.layers.{index}"
        y = normed(f"{layer}.layer_norm1", x)
        q, k, v = (mapped(f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
        heads = []
        for head in range(tower.width // 64):
            some = slice(64 * head, 64 * head + 64)
            scores = q[:, some] @ k[:, some].T / 8
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf) if causal else scores
            shares = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(shares / shares.sum(1, keepdims=True) @ v[:, some])
        x = x + mapped(f"{layer}.self_attn.out_proj", np.concatenate(heads, 1))
        y = mapped(f"{layer}.mlp.fc1", normed(f"{layer}.layer_norm2", x))
        x = x + mapped(f"{layer}.mlp.fc2", y / (1 + np.exp(-1.702 * y)))
    return x


def test_texts_are_those_of_the_formula(network):
    for text in ("cat", "a long text"):
        ids = tokenize(text)
        x = np.array(TENSORS["text_model.embeddings.token_embedding.weight"])[ids].astype(np.float64)
        x = x + np.array(TENSORS["text_model.embeddings.position_embedding.weight"])[: len(ids)]
        end = normed("text_model.final_layer_norm", encoded(SIZES.text, x, causal=True))[-1]
        expected = np.array(TENSORS["text_projection.weight"]) @ end
        found = network.encode_texts([text, "another"])[0]
        np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-5)


def test_pictures_are_those_of_the_formula(network):
    picture = np.random.default_rng(1).normal(size=(42, 42, 3))
    kernel = np.array(TENSORS["vision_model.embeddings.patch_embedding.weight"]).astype(np.float64)
    patches = [picture[i : i + 14, j : j + 14] for i in range(0, 42, 14) for j in range(0, 42, 14)]
    x = [np.array(TENSORS["vision_model.embeddings.class_embedding"])]
    x += [np.einsum("hwc,ochw->o", patch, kernel) for patch in patches]
    x = np.stack(x) + np.array(TENSORS["vision_model.embeddings.position_embedding.weight"])
    x = encoded(SIZES.vision, normed("vision_model.pre_layrnorm", x), causal=False)
    expected = np.array(TENSORS["visual_projection.weight"]) @ normed("vision_model.post_layernorm", x[0])
    found = np.array(network.images(mx.array(picture[None].astype(np.float32))))[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-5)
