"""The autoencoder: tiles, memory, names of old releases, and what is said of files and pictures that do not fit.

``test_parity.py`` compares with diffusers.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.models.parts import autoencoder
from mlxquant.models.parts.autoencoder_files import load_autoencoder
from mlxquant.models.parts.tiles import in_tiles

from support.parts import VAE, VAE_16, vae_tensors, write_component, write_json, write_vae

RNG = np.random.default_rng(3)
SMALL = {  # two levels: 2 pixels a place
    **VAE, "block_out_channels": [8, 16], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


def load(folder, dtype=mx.float32):
    return load_autoencoder(DiffusersFolder(str(folder)), "vae", dtype)


def normal(*shape):
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def blur(x):
    """A mean over 3 x 3 places, each of them four times: a decoder that sees one place far."""
    x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows, columns = x.shape[1] - 2, x.shape[2] - 2
    mean = sum(x[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9
    return mx.repeat(mx.repeat(mean, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 20), (32, 17), (5, 7)])
def test_tiles_are_the_whole_away_from_their_edges(height, width):
    """Of a function that sees one place far, only what stands beside an edge inside of the picture can differ."""
    x = normal(2, height, width, 3)
    whole, tiled = blur(x), in_tiles(blur, x, 8, 16)
    assert tiled.shape == whole.shape
    differs = (np.abs(np.array(tiled - whole)).max(axis=(0, 3)) > 1e-6)[::2, ::2]

    def beside(places):
        """Places that an edge of some tile is next to: tiles begin every 6 places and are 8 long."""
        edges = [edge for start in range(0, places, 6) for edge in (start, start + 8) if 0 < edge < places]
        return np.isin(np.arange(places), [place for edge in edges for place in (edge - 1, edge)])

    assert not differs[~(beside(height)[:, None] | beside(width)[None])].any()
    np.testing.assert_array_equal(in_tiles(lambda y: 2 * y, x, 8, 8).shape, x.shape)
    np.testing.assert_allclose(in_tiles(lambda y: 2 * y, x, 8, 8), 2 * x, atol=1e-6)


def test_a_seam_is_crossed_step_by_step():
    """Tiles that say other things go over into each other linearly, over a quarter of a tile."""
    said = iter(range(4))
    row = in_tiles(lambda x: mx.full(x.shape, float(next(said))), mx.zeros((1, 3, 20, 1)), 8, 8)
    expected = [0] * 6 + [0, 0.5] + [1] * 4 + [1, 1.5] + [2] * 4 + [2, 2.5]
    np.testing.assert_allclose(row[0, 0, :, 0], expected)


def test_big_pictures_go_in_tiles(tmp_path, monkeypatch):
    write_vae(tmp_path, config=SMALL)
    model, latent = load(tmp_path), normal(2, 12, 10, 4)
    assert model.factor == 2
    whole = model.decode(latent)
    np.testing.assert_array_equal(model.decode(latent, tile=16), whole)
    np.testing.assert_allclose(model.decode(latent[1:]), whole[1:], atol=1e-6)
    tiled = model.decode(latent, tile=8)
    assert np.abs(np.array(tiled - whole)).max() > 1e-3
    monkeypatch.setattr(autoencoder, "WHOLE", 8)
    np.testing.assert_array_equal(model.decode(latent), tiled)
    pictures = mx.clip(whole, -1, 1)
    np.testing.assert_array_equal(model.encode(pictures), model.encode(pictures, tile=8))
    assert model.encode(pictures).shape == latent.shape


def test_memory_is_that_of_a_tile(tmp_path):
    write_vae(tmp_path, config={**SMALL, "mid_block_add_attention": False})
    model, latent = load(tmp_path), normal(1, 96, 96, 4)
    mx.eval(model.parameters(), latent)

    def peak(tile):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(model.decode(latent, tile))
        return mx.get_peak_memory() - before

    assert peak(16) < peak(96) / 5


def test_the_encoder_stays_on_the_disk(tmp_path):
    write_vae(tmp_path)
    mx.clear_cache()
    before, model = mx.get_active_memory(), load(tmp_path)
    mx.eval(model.decode(normal(1, 4, 4, 4)))
    sizes = {part: sum(v.nbytes for n, v in vae_tensors(VAE).items() if n.startswith(part)) for part in ("en", "de")}
    assert mx.get_active_memory() - before < 1.3 * sizes["de"]
    mx.eval(model.encode(normal(1, 32, 32, 3)))
    assert mx.get_active_memory() - before > sizes["de"] + 0.9 * sizes["en"]


def test_scores_of_the_attention_are_bounded(tmp_path, monkeypatch):
    write_vae(tmp_path, config=SMALL)
    model, latent = load(tmp_path), normal(1, 7, 5, 4)
    whole = model.decode(latent)
    for scores in (1, 100):
        monkeypatch.setattr(autoencoder, "SCORES", scores)
        np.testing.assert_allclose(model.decode(latent), whole, atol=1e-5)


def test_latents_are_scaled_and_shifted(tmp_path):
    """As the sampler has them: what is decoded is ``latent / scale + shift``, what is encoded the other way round."""
    write_vae(tmp_path, config=VAE_16)
    latent, pictures = normal(1, 4, 4, 16), normal(1, 32, 32, 3)
    model = load(tmp_path)
    drawn, mean = model.decode(latent), model.encode(pictures)
    write_json(tmp_path / "vae" / "config.json", {**VAE_16, "scaling_factor": 1.0, "shift_factor": None})
    plain = load(tmp_path)
    np.testing.assert_allclose(drawn, plain.decode(latent / 1.5305 + 0.0609), atol=1e-5)
    np.testing.assert_allclose(mean, (plain.encode(pictures) - 0.0609) * 1.5305, atol=1e-5)


@pytest.mark.parametrize("axes", [0, 2])
def test_names_of_old_releases(tmp_path, axes):
    """The attention's matrices were named, and saved as kernels, otherwise."""
    write_vae(tmp_path, config=SMALL)
    latent, pictures = normal(1, 4, 4, 4), normal(1, 8, 8, 3)
    model = load(tmp_path)
    drawn, mean = np.array(model.decode(latent)), np.array(model.encode(pictures))
    named = vae_tensors(SMALL)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in named.items():
        renamed = name
        for new, before in old.items():
            renamed = renamed.replace(f".{new}.", f".{before}.")
        is_matrix = renamed != name and value.ndim == 2
        tensors[renamed] = value.reshape(*value.shape, *(1,) * axes) if is_matrix else value
    assert sum(name not in named for name in tensors) == 16
    write_component(tmp_path, "vae", SMALL, tensors, stem="diffusion_pytorch_model")
    model = load(tmp_path)
    np.testing.assert_array_equal(model.decode(latent), drawn)
    np.testing.assert_array_equal(model.encode(pictures), mean)


def test_half_precision(tmp_path):
    write_vae(tmp_path, config=SMALL, dtype=mx.float16)
    latent = normal(1, 4, 4, 4)
    half, full = load(tmp_path, mx.float16).decode(latent), load(tmp_path).decode(latent)
    assert (half.dtype, full.dtype) == (mx.float16, mx.float32)
    np.testing.assert_allclose(half.astype(mx.float32), full, atol=0.02)


def test_pictures_that_do_not_fit(tmp_path):
    write_vae(tmp_path)
    model = load(tmp_path)
    with pytest.raises(AdapterError, match=r"a latent of shape \(1, 4, 4, 16\), and the autoencoder takes \[B,H,W,4\]"):
        model.decode(mx.zeros((1, 4, 4, 16)))
    with pytest.raises(AdapterError, match=r"a picture of 12x16 pixels, and the autoencoder takes multiples of 8"):
        model.encode(mx.zeros((1, 16, 12, 3)))
    with pytest.raises(AdapterError, match=r"a picture of shape \(1, 3, 16, 16\)"):
        model.encode(mx.zeros((1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of 'AutoencoderTiny', expected AutoencoderKL"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', expected one of 'silu', 'swish'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types[0] is 'AttnUpDecoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "do not go with 4 and 3 blocks and 4 groups"),
        ({"norm_num_groups": 5}, "do not go with 4 and 4 blocks and 5 groups"),
        ({"latents_mean": [0.0]}, "latents_mean is an array of 1, expected one of None"),
        ({"latent_channels": 16}, "has shape"),
        ({"use_quant_conv": False}, "have quant_conv."),
        ({"layers_per_block": 3}, "lack"),
    ],
)
def test_what_is_said_of_files_that_do_not_fit(tmp_path, change, message):
    write_vae(tmp_path)
    write_json(tmp_path / "vae" / "config.json", {**VAE, **change})
    with pytest.raises(ArtifactError) as error:
        load(tmp_path)
    assert message in str(error.value)
