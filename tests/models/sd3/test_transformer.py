"""The transformer of each SD3: its names in diffusers, its sizes, and that its edges tell the truth."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.attention import find_attentions
from mlxquant.layers.tree import parameters
from mlxquant.models.mmdit.chain import mmdit_edges, mmdit_role, mmdit_stages
from mlxquant.models.mmdit.config import CONFIG, MMDiTConfig
from mlxquant.models.mmdit.network import MMDiT
from mlxquant.models.sd3 import names
from mlxquant.sweep.folding import check_folds

from support.sd3_reference import inputs
from support.sd3_transformers import DUAL, KINDS, LARGE, MEDIUM, random_transformer


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_there_and_back(kind):
    model = random_transformer(KINDS[kind])
    there = names.to_diffusers(parameters(model), model.config)
    back = names.from_diffusers(there, model.config)
    assert back.keys() == parameters(model).keys()
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(np.array(back[name]), np.array(value), name)
    said = names.config_to_diffusers(model.config)
    assert names.config_from_diffusers(said, "test") == model.config


def test_a_transformer_without_biases_of_keys_has_zeros_there():
    config = replace(random_transformer(MEDIUM).config, key_bias=False)
    there = names.to_diffusers(parameters(MMDiT(config)), config)
    assert not there["transformer_blocks.0.attn.to_k.bias"].any()
    assert "transformer_blocks.0.attn.to_k.weight" in there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**6}, "num_layers is 1000000, expected a whole number"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', expected one of 'rms_norm'"),
        ({"caption_projection_dim": 31}, "caption_projection_dim 31 and out_channels 4, expected 32 and 4"),
        ({"out_channels": 8}, "out_channels 8, expected 32 and 4"),
    ],
)
def test_other_configurations_are_refused(changes, message):
    with pytest.raises(ArtifactError, match=f"there: the transformer's config.json.*{message}"):
        names.config_from_diffusers({**MEDIUM, **changes}, "there")


def test_what_earlier_releases_saved_means_the_same():
    """0.2.0 knew no second attention, no biases of keys and one GELU, and wrote none of them down."""
    said = MMDiTConfig(num_heads=2, depth_multimodal=3, hidden_size=32).to_dict()
    assert {"dual_attention_layers", "key_bias", "gelu"}.isdisjoint(said)
    config = MMDiTConfig.from_dict(said)
    assert (config.dual_attention_layers, config.key_bias, config.gelu) == ((), False, "exact")
    more = random_transformer(DUAL).config
    CONFIG(more.to_dict(), "")
    assert more.to_dict()["dual_attention_layers"] == [0, 1]
    assert MMDiTConfig.from_dict(more.to_dict()) == more


def test_impossible_sizes_are_refused():
    with pytest.raises(AdapterError, match=r"dual_attention_layers \[3\] are none of the 3 blocks"):
        MMDiTConfig(depth_multimodal=3, dual_attention_layers=(0, 3))
    with pytest.raises(AdapterError, match="gelu 'erf'; expected one of"):
        MMDiTConfig(gelu="erf")


def host(model, edges):
    """As much of an adapter as folding asks for."""

    def run(state, sigma):
        for stage in mmdit_stages(model):
            state = stage.run(state)
        return state

    return SimpleNamespace(name="tiny", module=model, edges=lambda: edges, run=run)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_tell_the_truth(kind):
    said = KINDS[kind]
    model, given = random_transformer(said), dict(zip(("latent", "tokens", "pooled", "t"), inputs(said), strict=True))
    edges = mmdit_edges(model.config)
    check_folds(host(model, edges), given, 0.5, tolerance=1e-4)
    whole = model(*given.values())
    np.testing.assert_array_equal(np.array(host(model, edges).run(given, 0.5)["velocity"]), np.array(whole))


def test_an_edge_by_the_chunks_of_another_attention_is_seen():
    """The second attention reads by the last three of nine chunks."""
    model, given = random_transformer(DUAL), dict(zip(("latent", "tokens", "pooled", "t"), inputs(DUAL), strict=True))
    true = {edge.consumers[0]: edge for edge in mmdit_edges(model.config)}
    image = "multimodal_transformer_blocks.0.image_transformer_block"
    first, second = true[f"{image}.attn.q_proj"], true[f"{image}.attn2.q_proj"]
    for lie in (replace(second, folds=first.folds), replace(first, folds=second.folds)):
        with pytest.raises(AdapterError, match="is not true"):
            check_folds(host(model, (lie,)), given, 0.5)


def test_a_second_attention_is_found_and_its_layers_are_attention():
    model = random_transformer(DUAL)
    found = find_attentions(model)
    assert sorted(path for path in found if path.endswith("sdpa2")) == [
        f"multimodal_transformer_blocks.{i}.sdpa2" for i in (0, 1)
    ]
    path = "multimodal_transformer_blocks.0.image_transformer_block.attn2.q_proj"
    assert mmdit_role(path) == "attention"
    read = {edge.consumers for edge in mmdit_edges(model.config)}
    assert sum(any("attn2" in path for path in consumers) for consumers in read) == 4


def test_sizes_as_published():
    """Lazily built: 2.03 B, 2.24 B and 8.06 B parameters without their position tables, which are no parameters
    there.
    """
    medium = {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
              "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}  # fmt: skip
    dual = {**medium, "qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
    large = {**medium, **LARGE, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
             "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}  # fmt: skip
    large |= {"in_channels": 16, "out_channels": 16}
    for said, expected in ((medium, 2.03e9), (dual, 2.24e9), (large, 8.06e9)):
        counts = {name: value.size for name, value in parameters(MMDiT(names.config_from_diffusers(said, ""))).items()}
        total = sum(counts.values()) - counts["x_pos_embedder.pos_embed.weight"]
        assert total == pytest.approx(expected, rel=0.01)
