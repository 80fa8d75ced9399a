"""The real DiffusionKit, and tiny SD3-Medium checkpoints in its own files.

Without the package these tests are skipped, and where MLXQUANT_REQUIRE_DIFFUSIONKIT is set, as CI does, they fail. The
folder is a package of its own so that this file is not the ``conftest`` that other tests import from; it must not be
called diffusionkit.
"""

import os
from functools import partial
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session", autouse=True)
def diffusionkit():
    """The package ``diffusionkit.mlx``."""
    try:
        return import_module("diffusionkit.mlx")
    except ImportError as error:
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_DIFFUSIONKIT") else pytest.skip
        refuse(f"DiffusionKit does not import ({error}); pip install 'mlxquant[diffusionkit]'")


@pytest.fixture(scope="package")
def patch():
    """A monkeypatch that lasts as long as the tests of this folder."""
    with pytest.MonkeyPatch.context() as patches:
        yield patches


@pytest.fixture(scope="package")
def random_sd3(patch):
    """The script that writes the checkpoints."""
    patch.syspath_prepend(str(BENCHMARKS))
    return import_module("random_sd3")


@pytest.fixture(scope="package")
def hub_cache(diffusionkit, random_sd3, patch, tmp_path_factory):
    """A Hugging Face cache with tiny checkpoints, as if HF_HUB_CACHE and HF_HUB_OFFLINE had been set before Python
    started.
    """
    constants = import_module("huggingface_hub.constants")
    cache = random_sd3.write_hub_cache(tmp_path_factory.mktemp("hub"))
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture(scope="package")
def sd3_folder(diffusionkit, random_sd3, tmp_path_factory):
    """The same checkpoints in one folder; not to be written to."""
    return random_sd3.write_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def tiny_host(hub_cache, random_sd3, monkeypatch):
    """DiffusionKit's loaders with the tiny sizes in place of those that are written into it, and with the memory size
    that it asks of Metal. For tests of the host alone: an adapter has to do without.
    """
    model_io, config = import_module("diffusionkit.mlx.model_io"), import_module("diffusionkit.mlx.config")
    tiny = random_sd3.TINY
    transformer = config.MMDiTConfig(
        num_heads=tiny.heads, depth_multimodal=tiny.depth, hidden_size_override=tiny.hidden,
        max_latent_resolution=tiny.table,
        pooled_text_embed_dim=tiny.pooled, dtype=mx.float16, float16_dtype=mx.float16,
    )  # fmt: skip
    monkeypatch.setitem(model_io._CONFIG, random_sd3.MMDIT, transformer)
    for half in ("VAEDecoderConfig", "VAEEncoderConfig"):
        monkeypatch.setattr(model_io, half, partial(getattr(config, half), block_out_channels=tiny.vae))
    monkeypatch.setattr(mx.metal, "device_info", lambda: {"memory_size": 8 << 30})
    monkeypatch.setattr(model_io, "_FLOAT16", model_io._FLOAT16)  # a pipeline sets these two
    monkeypatch.setattr(model_io, "LOCAl_SD3_CKPT", model_io.LOCAl_SD3_CKPT)
