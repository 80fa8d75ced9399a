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
