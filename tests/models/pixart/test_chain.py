"""PixArt as a chain: what every host keeps, what folds, and that an edge which lies is found out."""

from dataclasses import replace

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.models.edges import Edge, Fold
from mlxquant.models.pixart.adapter import PixArtSigma
from mlxquant.sweep.folding import check_folds

from support.adapter_contract import AdapterContract
from support.pixart import small_adapter


class TestAlpha512(AdapterContract):
    NAME = "512"
    KIND = None

    @classmethod
    def make_adapter(cls):
        return small_adapter(cls.NAME)

    def whole(self, adapter, latent, conditioning, t):
        height, width = (8 * side for side in latent.shape[1:3])
        time = mx.array(adapter.scheduler.time(np.array(t) / 1000))  # what the contract tells a flow
        predicted = adapter.module(latent, conditioning["tokens"], conditioning["mask"], time, height, width)
        return predicted[..., : latent.shape[-1]]


class TestAlpha1024(TestAlpha512):
    NAME = "1024"


class TestSigma(TestAlpha512):
    NAME = "sigma"

    @classmethod
    def make_adapter(cls):
        return small_adapter(cls.NAME, PixArtSigma)


@pytest.fixture(scope="module")
def adapter():
    return small_adapter()


@pytest.fixture(scope="module")
def entered(adapter):
    noise = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(4))
    return adapter.state(noise, adapter.encode(["a tree in the fog", "night"]), 0.6), 0.6


BLOCK, SHARED = "transformer_blocks.1", "adaln_single.linear"
LIES = {
    "modulated input of q, k, v": Edge(
        tuple(f"{BLOCK}.attn1.to_{name}" for name in "qkv"), (Fold(SHARED, 0, 24), Fold(SHARED, 24, 48, plus_one=True))
    ),
    "modulated input of the MLP": Edge(
        (f"{BLOCK}.ff.net.0.proj",), (Fold(SHARED, 72, 96), Fold(SHARED, 96, 120, plus_one=True))
    ),
    "captions of one block": Edge(
        tuple(f"{BLOCK}.attn2.to_{name}" for name in "kv"), (Fold("caption_projection.linear_2", 0, 24),)
    ),
    "values of another attention": Edge((f"{BLOCK}.attn2.to_out.0",), (Fold(f"{BLOCK}.attn1.to_v", 0, 24),)),
    "stream that the query reads": Edge((f"{BLOCK}.attn2.to_q",), (Fold(f"{BLOCK}.attn1.to_out.0", 0, 24),)),
}


@pytest.mark.parametrize("name", LIES)
def test_an_edge_that_lies_is_found_out(adapter, entered, monkeypatch, name):
    monkeypatch.setattr(adapter, "edges", lambda: (LIES[name],))
    with pytest.raises(AdapterError, match="is not true"):
        check_folds(adapter, *entered)


def test_values_are_mixed_inside_of_heads_alone(monkeypatch):
    """Heads of 4 channels; the largest rotation of all 16 is over four of them."""
    adapter = small_adapter("small heads")
    noise = 2 * mx.random.normal((1, *adapter.latent_shape), key=mx.random.key(4))
    state = adapter.state(noise, adapter.encode(["a tree in the fog"]), 0.6)
    check_folds(adapter, state, 0.6)
    lies = [replace(edge, mixes=16) for edge in adapter.edges() if edge.mixes == 4]
    assert len(lies) == 4
    for lie in lies:
        monkeypatch.setattr(adapter, "edges", lambda lie=lie: (lie,))
        with pytest.raises(AdapterError, match="mixed in all that it names"):
            check_folds(adapter, state, 0.6, tolerance=1e-3)


def test_folds_are_exact(adapter, entered):
    """To rounding, and no more: the contract's tolerance is for models in half precision."""
    check_folds(adapter, *entered, tolerance=1e-5)


def test_what_is_careful_and_what_is_not(adapter):
    kinds = {}
    for path, role in adapter.roles().items():
        kinds.setdefault(str(role), set()).add(path.removeprefix("transformer_blocks.0."))
    assert kinds["modulation"] == {SHARED}
    assert kinds["output"] == {"proj_out"}
    assert kinds["mlp"] >= {"ff.net.0.proj", "ff.net.2"}
    names = {f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")}
    assert {path for path in kinds["attention"] if not path.startswith("transformer_blocks")} == names
    assert all(path.startswith(("adaln_single.emb.", "caption_projection.")) for path in kinds["embedder"])
    assert not any(path.startswith("pos_embed") for path in adapter.layers())


def test_both_attentions_of_a_block_can_be_opened(adapter):
    assert sorted(adapter.attentions()) == [f"transformer_blocks.{i}.attn{j}.sdpa" for i in (0, 1) for j in (1, 2)]


def test_padding_does_not_matter(adapter):
    text = adapter.encode(["a tree", "fog"])
    latent = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(2))
    other = text.beside(tokens=mx.where(text["mask"][..., None], text["tokens"], -7.0))
    found, same = (np.array(adapter.velocity(latent, read, 0.4)) for read in (text, other))
    np.testing.assert_array_equal(found, same)


def test_a_model_for_1024_pixels_sees_how_large_a_picture_is():
    """The same tokens at the same relative places, and other sizes told."""
    large, small = small_adapter("1024"), small_adapter("sigma", PixArtSigma)
    text = large.encode(["a tree", "fog"])
    latent = mx.random.normal((2, 8, 12, 4), key=mx.random.key(2))
    found = {}
    for adapter in (large, small):
        states = [adapter.stages[0].run(adapter.state(x, text, 0.5)) for x in (latent, latent.swapaxes(1, 2))]
        found[adapter.name] = [np.array(state["c"]) for state in states]
    assert np.abs(found["pixart-alpha"][0] - found["pixart-alpha"][1]).max() > 1e-3
    np.testing.assert_array_equal(*found["pixart-sigma"])


def test_sizes(adapter):
    twin = adapter.twin()
    assert (twin.size, twin.latent_shape) == ((64, 96), (12, 8, 4))
    assert twin.components is adapter.components, "what stands around a transformer is loaded once"
    with pytest.raises(AdapterError, match="multiple of 16 pixels; 72 is none"):
        twin.resize((72, 64))
    twin.resize((80, 48))
    assert twin.latent_shape == (6, 10, 4)
    assert type(twin).described(twin.describe()).size == (80, 48)


def test_time_and_variance_are_the_schedulers(adapter):
    assert adapter.parameterization.kind == "epsilon"
    assert adapter.parameterization.learned_variance
    assert not small_adapter("no variance").parameterization.learned_variance
    assert (adapter.steps, adapter.cfg, adapter.length, PixArtSigma.length) == (20, 4.5, 120, 300)
    walk = adapter.walk(10)
    np.testing.assert_array_equal(adapter.scheduler.time(walk.levels[:-1]), np.round(np.linspace(0, 999, 11))[:0:-1])
    latent = mq.Model(adapter).adapter.generate(["a tree"], [3], 2)
    assert latent.shape == (1, *adapter.latent_shape)


def test_conditions_are_for_alpha_alone():
    with pytest.raises(AdapterError, match="pixart-sigma: its transformer reads resolution and aspect ratio"):
        small_adapter("1024", PixArtSigma)


def test_prompts_are_read_in_lower_case_and_stripped():
    adapter, read = small_adapter(), []
    waves = adapter.components.text
    adapter.components.text = lambda prompts: read.extend(prompts) or waves(prompts)
    found = adapter.encode(["  A Cat\n", "a cat", "FOG"])
    assert read == ["a cat", "fog"]
    np.testing.assert_array_equal(np.array(found["tokens"][0]), np.array(found["tokens"][1]))
