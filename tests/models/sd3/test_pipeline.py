"""Transformers, texts and whole pipelines against diffusers': the same latents in, the same sequence of latents out."""

import shutil

import pytest

from mlxquant.models.catalog import find_model

from support.sd3_folder import write_whole
from support.sd3_reference import CASES, LIMITS, SEEDS, differences, loaded
from support.sd3_transformers import MEDIUM

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("case", CASES)
def test_equal(case, tmp_path):
    found = differences(tmp_path, case)
    assert found.keys()
    assert not {name: value for name, value in found.items() if not value < LIMITS.get(name, 1e-5)}


def test_without_t5_it_says_so_and_reads_zeros(tmp_path, caplog):
    folder = write_whole(tmp_path / "sd3", MEDIUM, t5=False)
    assert find_model(str(folder))[0] == "sd3-medium"
    adapter, _ = loaded(tmp_path / "with", MEDIUM)
    adapter.place = str(folder)
    tokens = adapter.encode(["a cat"])["tokens"]
    assert tokens.shape == (1, 77 + 256, 80)
    assert not tokens[:, 77:].any()
    assert "has no text_encoder_3 (T5): drawing without it, as diffusers does" in caplog.text
    shutil.copytree(tmp_path / "with", tmp_path / "left out", ignore=lambda *_: ["text_encoder_3"])
    adapter.place = str(tmp_path / "left out")
    assert not adapter.encode(["a cat"])["tokens"][:, 77:].any()
    caplog.clear()
    adapter.place = str(tmp_path / "with")
    assert adapter.encode(["a cat"])["tokens"][:, 77:].any()
    assert not caplog.text


def test_a_batch_begins_with_each_seeds_noise(tmp_path):
    adapter, noise = loaded(tmp_path, MEDIUM)
    seen = []
    adapter.generate(["a cat"], [SEEDS[1]], 1, 1.0, lambda step: seen.append(step.latent))
    assert (seen[0] == noise[1:]).all()
