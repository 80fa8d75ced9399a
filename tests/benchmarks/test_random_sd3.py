"""benchmarks/random_sd3.py: real files of the real size, reproducible, refused before anything is written. Text
encoders: tests/host.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import mlxquant as mq  # before mlx

# isort: split
import numpy as np
import pytest
import safetensors.numpy

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_sd3.py"


@pytest.fixture
def random_sd3(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("random_sd3")


@pytest.fixture
def random_tensors(random_sd3):
    return importlib.import_module("random_tensors")


def run(folder, *arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_seed_gives_the_same_bytes_and_the_last_line_is_json(tmp_path):
    written = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        done = run(tmp_path, "--folder", name, "--no-text", "--seed", str(seed))
        assert done.returncode == 0, done.stderr
        written[name] = (tmp_path / name / "sd3_medium.safetensors").read_bytes()
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["bytes"] == len(written[name])
        assert [file.name for file in (tmp_path / name).iterdir()] == ["sd3_medium.safetensors"]
    assert written["one"] == written["two"] != written["other"]


@pytest.mark.parametrize("arguments", [[], ["--folder", "a", "--hub-cache", "b"], ["--hub-cache", "b", "--no-text"]])
def test_unclear_requests_are_refused(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "pass either --folder or --hub-cache" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_real_size(random_sd3):
    """2.085 and 2.470 B parameters; names and shapes are compared with DiffusionKit's own modules in tests/host."""
    sizes = random_sd3.SD3_MEDIUM
    assert random_sd3.parameters(random_sd3.mmdit(sizes)) == 2_084_951_104
    assert 75e6 < random_sd3.parameters(random_sd3.vae(sizes)) < 90e6
    names = [tensor.name for part in (random_sd3.mmdit, random_sd3.vae) for tensor in part(sizes)]
    assert len(names) == len(set(names))
    assert random_sd3.parameters(random_sd3.mmdit(random_sd3.SD35_MEDIUM)) == 2_469_663_936


@pytest.mark.parametrize(("size", "name"), [("tiny", "sd3-medium"), ("tiny-3.5", "sd3.5-medium")])
def test_our_own_host_reads_it(random_sd3, size, name, tmp_path):
    sizes = random_sd3.SIZES[size]
    random_sd3.write_checkpoint(tmp_path, sizes, 0)
    adapter = mq.load(tmp_path / sizes.file).adapter
    assert (adapter.name, adapter.config.num_heads, adapter.config.max_latent_resolution) == (name, 2, sizes.table)
    assert adapter.components.autoencoder.factor == 8


def test_the_file_is_read_by_safetensors(random_sd3, random_tensors, tmp_path):
    tensors = list(random_sd3.mmdit(random_sd3.TINY))
    random_tensors.write_tensors(tmp_path / "x.safetensors", tensors, seed=0)
    arrays = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(arrays) == {tensor.name for tensor in tensors}
    for tensor in tensors:
        array = arrays[tensor.name]
        assert (array.shape, array.dtype) == (tensor.shape, np.float16)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, tensor.draw(0))


def test_scales_differ_by_layer_row_and_channel(random_tensors):
    weights = [next(random_tensors.linear(f"layer{i}", 512, 1280)).draw(0).astype(np.float32) for i in range(8)]
    scale = np.array([weight.std() for weight in weights]) * np.sqrt(1280)
    assert 0.5 < scale.min() < scale.max() < 2
    assert scale.max() > 1.2 * scale.min()
    channels = weights[0].std(axis=0)
    assert (channels > 2.5 * np.median(channels)).sum() == 10  # one in 128
    rows = weights[0].std(axis=1)
    assert rows.max() > 1.5 * rows.min()


def test_parts_of_the_rows_have_their_own_scale(random_tensors):
    weight = random_tensors.Tensor("adaLN", (300, 400), 0.1, parts=(1.0, 0.1, 1.0)).draw(0).astype(np.float32)
    first, gate, last = (part.std() for part in np.split(weight, 3))
    assert 5 < first / gate < 20
    assert 0.5 < first / last < 2
