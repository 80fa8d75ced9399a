"""PixArt's transformer against diffusers' PixArtTransformer2DModel, with text of several lengths."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.tree import parameters

from support.pixart import CONFIGS, small_config, small_network

TOKENS = 7
LENGTHS = {"all": (7, 7), "several": (7, 3), "one": (1, 1)}  # of the two texts


def theirs(config, ours):
    """Diffusers' model with the same weights."""
    import torch
    from diffusers import PixArtTransformer2DModel

    options = {name: value for name, value in config.items() if not name.startswith("_")}
    model = PixArtTransformer2DModel(**options).eval()
    values = {name: np.array(value) for name, value in parameters(ours).items()}
    values["pos_embed.proj.weight"] = values["pos_embed.proj.weight"].transpose(0, 3, 1, 2)
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return model


def asked(config, rows, columns, lengths):
    random = np.random.default_rng(3)
    latent = random.standard_normal((2, rows, columns, config["in_channels"])).astype(np.float32)
    tokens = random.standard_normal((2, TOKENS, config["caption_channels"])).astype(np.float32)
    return latent, tokens, np.arange(TOKENS) < np.array(lengths)[:, None], np.array([991.0, 13.0], np.float32)


@pytest.mark.diffusers
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sides", [(8, 8), (8, 16), (24, 4)], ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if " block" not in name])
def test_the_same_as_diffusers(name, sides, lengths):
    import torch

    config = small_config(name)
    ours = small_network(config)
    latent, tokens, mask, t = asked(config, *sides, LENGTHS[lengths])
    height, width = (8 * side for side in sides)
    found = np.array(ours(*map(mx.array, (latent, tokens, mask, t)), height, width))
    conditions = {"resolution": None, "aspect_ratio": None}
    if ours.config.use_additional_conditions:
        conditions = {
            "resolution": torch.tensor([[height, width]] * 2, dtype=torch.float32),
            "aspect_ratio": torch.tensor([[height / width]] * 2, dtype=torch.float32),
        }
    with torch.no_grad():
        (wanted,) = theirs(config, ours)(
            torch.tensor(latent.transpose(0, 3, 1, 2)),
            encoder_hidden_states=torch.tensor(tokens),
            encoder_attention_mask=torch.tensor(mask.astype(np.int64)),
            timestep=torch.tensor(t),
            added_cond_kwargs=conditions,
            return_dict=False,
        )
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    assert found.shape == (2, *sides, ours.config.out_channels)
    assert 0.5 < np.abs(wanted).max() < 5
    np.testing.assert_allclose(found, wanted, atol=1e-5)
