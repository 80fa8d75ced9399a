"""A mixture of experts of mlx-lm: its experts are quantized, its router with care, and stock mlx-lm runs what is
exported.
"""

import json

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.api.plan import plan
from mlxquant.layers.switch import QuantizedSwitchLinear, SwitchLinear
from mlxquant.layers.tree import get_module
from mlxquant.models.gpt.tokenizers import ByteTokenizer
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.sweep.share import planned_share

from support.tiny_language import TEXT

pytestmark = pytest.mark.mlxlm
mlx_lm = pytest.importorskip("mlx_lm")

CONFIG = {
    "model_type": "mixtral", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = mx.array([[7, 1, 200, 3, 3, 90]])
EXPERTS = "model.layers.0.block_sparse_moe.switch_mlp"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from mlx_lm.models import mixtral

    folder, rng = tmp_path_factory.mktemp("mixtral"), np.random.default_rng(0)
    module = mixtral.Model(mixtral.ModelArgs.from_dict(CONFIG))
    arrays = {
        name: mx.array(rng.normal(0, value.shape[-1] ** -0.5, value.shape).astype(np.float32))
        if value.ndim > 1
        else value
        for name, value in tree_flatten(module.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, text in ByteTokenizer().files().items():
        (folder / name).write_text(text)
    return mq.load(folder)


@pytest.fixture(scope="module")
def calib(model, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return mq.calibrate_text(model, text, 8, 32)


def logits(model):
    return np.array(model.adapter.logits(TOKENS))


def test_experts_are_in_the_plan_and_the_router_keeps_eight_bits(model):
    assert isinstance(get_module(model.module, f"{EXPERTS}.up_proj"), SwitchLinear)
    found = plan(model, parse_recipe("gptq-w4a16-g32"))
    assert {found[f"{EXPERTS}.{name}_proj"].weight.bits for name in ("gate", "up", "down")} == {4}
    assert found["model.layers.0.block_sparse_moe.gate"].weight.bits == 8
    share = planned_share(model.adapter, found)
    assert share.parameters > 0.9
    assert set(share.kept) == {"embedding", "norm"}


def test_what_is_quantized_comes_back_and_runs_in_stock_mlx_lm(model, calib, tmp_path):
    done = mq.quantize(model, calib, "gptq-w4a16-g32")
    assert isinstance(done.layers[f"{EXPERTS}.down_proj"], QuantizedSwitchLinear)
    done.save(tmp_path / "q")
    np.testing.assert_array_equal(logits(mq.load(tmp_path / "q")), logits(done))
    mq.export(done, tmp_path / "stock", "mlx-lm")
    stock, _ = mlx_lm.load(str(tmp_path / "stock"))
    np.testing.assert_allclose(np.array(stock(TOKENS)), logits(done), atol=1e-4)
    weight = get_module(stock, f"{EXPERTS}.down_proj").weight
    assert weight.shape == (4, 64, 96 * 4 // 32)
    np.testing.assert_array_equal(
        np.array(weight), np.array(done.layers[f"{EXPERTS}.down_proj"].weight).reshape(4, 64, -1)
    )
    mq.export(done, tmp_path / "ours", "mlx")
    np.testing.assert_array_equal(logits(mq.load(tmp_path / "ours")), logits(done))


def test_gptq_beats_rounding_to_nearest_on_experts(model, calib):
    nearest, ours = (
        {
            path: row["error"]
            for stage in mq.quantize(model, calib, recipe).facts["stages"]
            for path, row in stage["layers"].items()
            if "switch_mlp" in path
        }
        for recipe in ("rtn-w3a8-token", "gptq-w3a8-token")
    )
    assert len(ours) == 6
    assert all(ours[path] < 0.95 * nearest[path] for path in ours)


def test_many_tokens_are_sorted_by_expert_and_it_makes_no_difference(model, calib):
    """mlx-lm sorts from 64 on."""
    done = mq.quantize(model, calib, "gptq-w4a8-token")
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (1, 60)))
    whole, short = np.array(done.adapter.logits(tokens)), np.array(done.adapter.logits(tokens[:, :6]))
    np.testing.assert_allclose(whole[:, :6], short, atol=1e-3 * np.abs(short).max())
