"""Stable Diffusion as a host: the contract, its chain, its edges."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.models.edges import Edge, Fold
from mlxquant.models.stages import tensors
from mlxquant.models.unet.config import UNetConfig
from mlxquant.sampling.parameterizations import Parameterization
from mlxquant.sampling.pndm import PNDM
from mlxquant.sweep.folding import check_folds

from support.adapter_contract import AdapterContract
from support.tiny_unet import CONFIGS, SCHEDULER, small_adapter


def whole(model, latent, text, t):
    """The network run as diffusers runs it, with a stack of skips."""
    x, time = model.conv_in(latent), model.embed_time(t)
    skips = [x]
    for block in model.down_blocks:
        for index in range(len(block.resnets)):
            x = block.pair(index, x, time, text)
            skips.append(x)
        if "downsamplers" in block:
            x = block.downsamplers[0](x)
            skips.append(x)
    for index in range(2):
        x = model.mid_block.pair(index, x, time, text)
    for block in model.up_blocks:
        for index in range(len(block.resnets)):
            x = block.pair(index, mx.concatenate([x, skips.pop()], axis=-1), time, text)
        if "upsamplers" in block:
            x = block.upsamplers[0](x, *skips[-1].shape[1:3])
    return model.head(x)


class UNetContract(AdapterContract):
    def whole(self, adapter, latent, conditioning, t):
        return whole(adapter.module, latent, conditioning["text"], mx.array(adapter.scheduler.time(t / 1000)))


class TestLike15(UNetContract):
    @classmethod
    def make_adapter(cls):
        return small_adapter()


class TestLike21(UNetContract):
    @classmethod
    def make_adapter(cls):
        return small_adapter(CONFIGS["2.1"], {**SCHEDULER, "prediction_type": "v_prediction"}, size=(56, 72))


class TestMixed(UNetContract):
    @classmethod
    def make_adapter(cls):
        return small_adapter(CONFIGS["mixed"], size=(72, 64))


@pytest.fixture(scope="module")
def adapter():
    return small_adapter()


@pytest.fixture
def state(adapter):
    return adapter.state(mx.random.normal((1, *adapter.latent_shape), key=mx.random.key(1)), adapter.encode(["a"]), 0.5)


def test_a_skip_is_the_array_that_goes_on(adapter, state):
    """It counts once, and is gone when it was read."""
    with adapter.clock.at(0.5):
        for stage in adapter.stages[:-1]:
            after = stage.run(state)
            wrote = tensors(after, state)
            (picture,) = [key for key in wrote if key.startswith("x.")]
            assert list(wrote) == [picture] or stage.name == "embed", stage.name
            if stage.name.startswith("down"):
                assert wrote[picture][0] == picture
                assert wrote[picture][1].startswith("skip.")
            state = after
    assert sorted(state) == ["text", "time", "x.0"]


def test_roles(adapter):
    roles = {path: str(role) for path, role in adapter.roles().items()}
    first = "down_blocks.0.attentions.0"
    assert roles["conv_in"] == roles["time_embedding.linear_1"] == roles["time_embedding.linear_2"] == "embedder"
    assert roles["conv_out"] == "output"
    assert roles["mid_block.resnets.1.time_emb_proj"] == "modulation"
    assert roles[f"{first}.transformer_blocks.0.attn1.to_q"] == "attention"
    assert roles[f"{first}.transformer_blocks.0.attn2.to_out.0"] == "attention"
    assert roles[f"{first}.transformer_blocks.0.ff.net.0.proj"] == "mlp"
    assert roles["up_blocks.0.resnets.0.conv1"] == roles["up_blocks.0.upsamplers.0.conv"] == "mlp"
    assert roles["up_blocks.0.resnets.0.conv_shortcut"] == "shortcut"
    assert adapter.roles()["up_blocks.0.resnets.0.conv_shortcut"].careful
    assert {role.careful for path, role in adapter.roles().items() if "conv1" in path} == {False}


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
WRONG = {  # by what is wrong: an edge that could be there and lies
    "a norm that is activated before it is read": Edge(
        ("up_blocks.0.resnets.0.conv_shortcut",), (Fold("up_blocks.0.resnets.0.norm1", 0, 64),)
    ),
    "the gate of GEGLU": Edge((f"{BLOCK}.ff.net.2",), (Fold(f"{BLOCK}.ff.net.0.proj", 128, 256),)),
    "the norm of another attention": Edge((f"{BLOCK}.attn2.to_q",), (Fold(f"{BLOCK}.norm1", 0, 32),)),
    "a norm that others read, too": Edge((f"{BLOCK}.attn1.to_q",), (Fold(f"{BLOCK}.norm1", 0, 32),)),
    "heads that are narrower": Edge((f"{FIRST}.attn1.to_out.0",), (Fold(f"{FIRST}.attn1.to_v", 0, 16),), mixes=16),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_edge_that_lies_is_seen(adapter, state, monkeypatch, what):
    monkeypatch.setattr(adapter, "edges", lambda: (WRONG[what],))
    with pytest.raises(AdapterError, match="is not true"):
        check_folds(adapter, state, 0.5, 1e-3)


def test_edges_hold_to_the_last_digits(adapter, state):
    check_folds(adapter, state, 0.5, 1e-5)


def test_what_reads_the_text_is_one_edge_a_block(adapter):
    read = [edge.consumers for edge in adapter.edges() if not edge.folds]
    assert len(read) == 4
    assert read[0] == tuple(f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{name}" for name in "kv")


def test_the_scheduler_is_the_folders(adapter):
    assert adapter.scheduler == PNDM(replace(adapter.scheduler.training), "leading", 1)
    assert (adapter.cfg, adapter.steps, adapter.parameterization) == (7.5, 50, Parameterization("epsilon"))
    assert adapter.twin().scheduler == adapter.scheduler


def test_sizes(adapter):
    assert adapter.size == (64, 64)
    assert adapter.latent_of(136, 72) == (9, 17, 4)
    for side in (60, 0):
        with pytest.raises(AdapterError, match=f"multiple of 8 pixels; {side} is none"):
            adapter.latent_of(side, 64)


def test_a_unet_that_reads_more_than_a_latent_is_refused():
    with pytest.raises(AdapterError, match=r"reads 9 channels and writes 4 .*inpainting"):
        small_adapter({**CONFIGS["1.5"], "in_channels": 9})


def test_text_of_all_blocks_is_one_object(adapter, state):
    with adapter.clock.at(0.5):
        text = state["text"]
        for stage in adapter.stages[:-1]:
            state = stage.run(state)
            assert state["text"] is text


def test_what_it_computes_is_what_its_config_says():
    one = small_adapter(CONFIGS["mixed"])
    assert type(one).described(one.describe()).config == UNetConfig.from_dict(CONFIGS["mixed"])
    assert np.isfinite(np.array(one.generate(["b"], [3], 2))).all()
