"""Step 3 of the weight track: what it promises, the same bytes after any interruption, and one clear error on
everything else.
"""

import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlxquant import adaround_optimize
from mlxquant.files.checked import file_digest, read_json
from mlxquant.layers.tree import get_module
from mlxquant.methods.weights import adaround
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.pipeline.apply import TrackFiles, install
from mlxquant.pipeline.block_cache import BlockCache
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.pipeline.weight_files import WeightFiles
from mlxquant.sweep import store
from mlxquant.sweep import sweep as sweeping
from mlxquant.sweep.folding import divide

from support import command_line
from support.command_line import run, succeed
from support.six_steps import analyze, cache, collect, draw, files, tiny_model
from support.tiny_pictures import tiny_adapter

Q = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"
FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"
SHORT = ("--iters", 12, "--batch-size", 4, "--learning-rate", 0.4)  # enough to flip codes
ONE = ("--iters", 1)
fail = partial(command_line.fail, code=1)


def spiky_adapter():
    """The tiny model with one channel that stands out before q, k and v, and one after a GELU: SmoothQuant and
    migration pay.
    """
    adapter = tiny_adapter()
    divisor = np.ones(32, np.float32)
    divisor[5] = 1 / 60
    divide(adapter.module, next(edge for edge in adapter.edges() if Q in edge.consumers), divisor)
    fc1, fc2 = get_module(adapter.module, FC2.replace("fc2", "fc1")), get_module(adapter.module, FC2)
    row = mx.where(mx.arange(128) == 7, 8.0, 1.0)
    fc1.weight, fc1.bias, fc2.weight = fc1.weight * row[:, None], fc1.bias * row, fc2.weight / row
    return adapter


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """The small model, looked at every fifth iteration, without MLX's compiler: a second a block, and others
    test it.
    """
    with tiny_model(spiky_adapter) as patch:
        patch.setattr(adaround, "EVERY", 5)
        yield


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    """Trajectories, block cache and quantization config."""
    folder = tmp_path_factory.mktemp("calib")
    draw(folder, 2, 4, "--cfg-weight", 2)
    cache(folder, 2, 2)
    collect(folder, 2)
    analyze(folder, "--migration")
    return folder


@pytest.fixture(scope="module")
def whole(calib, tmp_path_factory):
    """An uninterrupted run, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, succeed(*verb(calib, folder))[0]


def verb(calib, out, *options, length=SHORT):
    return ("adaround-optimize", "--cache-dir", calib / "adaround_cache", "--output-dir", out, *length, *options)


def config_of(folder):
    return read_json(folder / "config.json", "adaround-weights")


def test_the_folder_is_as_promised(calib, whole):
    folder, facts = whole
    assert set(files(folder)) == {"config.json", "weights/mm0.npz", "weights/mm1.npz"}
    config = config_of(folder)
    assert (config["bits_w"], config["bits_a"], config["iters"], config["start"]) == (4, 8, 12, "gptq")
    learning = config["recipe"]["learning"]
    assert {name: learning[name] for name in ("iterations", "batch", "rate", "seed")} == {
        "iterations": 12, "batch": 4, "rate": 0.4, "seed": 0
    }  # fmt: skip
    assert {"pressure", "warmup", "drop", "trust"} <= set(learning)
    assert config["parents"] == {"metadata.json": file_digest(calib / "adaround_cache" / "metadata.json")}
    assert config["calibration"] == file_digest(calib / "manifest.json")
    assert config["complete"] is True
    assert config["files"] == {
        f"weights/{name}": file_digest(folder / "weights" / name) for name in ("mm0.npz", "mm1.npz")
    }
    assert set(config["blocks"]) == {"mm0", "mm1"}
    for block in config["blocks"].values():
        assert set(block["errors"]) == {"learned", "calibrated", "rtn"}
        assert block["error"] == min(block["errors"].values())
    assert {"output", "blocks", "win_rate", "seconds", "peak_bytes"} <= set(facts)
    assert (facts["blocks"], facts["output"]) == (2, str(folder))
    for path in (calib, folder):
        assert str(path) not in (folder / "config.json").read_text()


def test_learning_wins_and_says_how_much_it_changed(calib, tmp_path):
    facts, _ = succeed(
        *verb(calib, tmp_path, "--start", "nearest", length=("--iters", 60, "--batch-size", 4, "--learning-rate", 0.1))
    )
    blocks = config_of(tmp_path)["blocks"].values()
    assert any(b["kept"] == "learned" for b in blocks)
    for block in blocks:
        errors = block["errors"]
        assert (block["kept"] == "learned") == (errors["learned"] < min(errors["calibrated"], errors["rtn"]))
        if block["kept"] == "learned":
            assert 0 < block["learning"]["flipped"] < 0.7
    assert (
        facts["win_rate"]
        == np.mean([b["errors"]["learned"] < min(b["errors"]["calibrated"], b["errors"]["rtn"]) for b in blocks])
        > 0
    )


def test_a_tie_is_no_win_and_a_block_that_lost_is_reported(calib, tmp_path, monkeypatch):
    assert succeed(*verb(calib, tmp_path / "tie", length=ONE))[0]["win_rate"] == 0  # one step flips nothing

    def broken(method, work, *rest):
        return {path: np.zeros_like(rounded.codes) for path, rounded in work._goals.items()}, {"iterations": 1}

    monkeypatch.setattr(sweeping, "reconstruct_stage", broken)
    facts, said = succeed(*verb(calib, tmp_path / "lost"))
    assert facts["win_rate"] == 0
    assert "calibrated" in said
    assert {block["kept"] for block in config_of(tmp_path / "lost")["blocks"].values()} <= {"calibrated", "rtn"}


def interrupted(monkeypatch, calib, out, target, name, at, before=False):
    """Run until the ``at``-th call of a method, which is done (or not begun, with ``before``) when Ctrl-C comes."""
    original, calls = getattr(target, name), []

    def stop(self, *rest):
        calls.append(rest)
        if len(calls) == at and before:
            raise KeyboardInterrupt
        original(self, *rest)
        if len(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop)
        outcome = run(*verb(calib, out))
    assert outcome.exit_code == 130
    assert "Run the same command again" in outcome.stderr


@pytest.mark.parametrize(
    ("target", "name", "at", "before", "left"),
    [
        (store.StageCheckpoint, "save", 2, False, {"mm0.checkpoint.safetensors"}),  # inside the first block
        (
            store.StageCheckpoint,
            "save",
            4,
            False,
            {"mm1.checkpoint.safetensors", "weights/mm0.npz"},
        ),  # inside the second
        (WeightFiles, "save", 1, False, {"weights/mm0.npz"}),  # between the blocks
        (WeightFiles, "save", 2, True, {"mm1.checkpoint.safetensors", "weights/mm0.npz"}),  # learned and not written
        (
            store.StageCheckpoint,
            "clear",
            1,
            True,
            {"mm0.checkpoint.safetensors", "weights/mm0.npz"},
        ),  # written and not cleared
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    calib, whole, tmp_path, monkeypatch, target, name, at, before, left
):
    monkeypatch.setattr(store, "INTERVAL", 0.0)
    interrupted(monkeypatch, calib, tmp_path, target, name, at, before)
    assert set(files(tmp_path)) - {"config.json"} == left
    succeed(*verb(calib, tmp_path))
    assert files(tmp_path) == files(whole[0])


def test_no_resume_starts_over(calib, whole, tmp_path, monkeypatch):
    interrupted(monkeypatch, calib, tmp_path, WeightFiles, "save", 1)
    saved, save = [], WeightFiles.save
    monkeypatch.setattr(
        WeightFiles, "save", lambda self, stage, result: (saved.append(stage.name), save(self, stage, result))[1]
    )
    succeed(*verb(calib, tmp_path, "--no-resume"))
    assert len(saved) == 2
    assert files(tmp_path) == files(whole[0])


def test_a_damaged_checkpoint_is_left_behind_by_no_resume(calib, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "INTERVAL", 0.0)
    interrupted(monkeypatch, calib, tmp_path, store.StageCheckpoint, "save", 1)
    path = tmp_path / "mm0.checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "pass --no-resume, or remove the file" in fail(*verb(calib, tmp_path))
    succeed(*verb(calib, tmp_path, "--no-resume"))
    assert files(tmp_path) == files(whole[0])


def test_a_finished_folder_is_left_alone(calib, whole, monkeypatch):
    folder, facts = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(adaround_optimize, "learn", None)
    again, _ = succeed(*verb(calib, folder))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert {k: again[k] for k in ("output", "blocks", "win_rate")} == {
        k: facts[k] for k in ("output", "blocks", "win_rate")
    }


def test_other_settings_need_force(calib, tmp_path):
    succeed(*verb(calib, tmp_path, length=ONE))
    before = files(tmp_path)
    for option, names in (
        (("--bits-w", 3), "bits_w, recipe"),
        (("--seed", 1), "recipe"),
        (("--start", "nearest"), "recipe, start"),
    ):
        message = fail(*verb(calib, tmp_path, *option, length=ONE))
        assert f"other settings or inputs ({names})" in message
        assert "--force to let adaround-optimize start over" in message
    assert files(tmp_path) == before
    succeed(*verb(calib, tmp_path, "--bits-w", 3, "--force", length=ONE))
    assert config_of(tmp_path)["bits_w"] == 3


@pytest.mark.parametrize("start", ["nearest", "qronos"])
def test_every_start_works_and_records_itself(calib, whole, tmp_path, start):
    succeed(*verb(calib, tmp_path, "--start", start, length=ONE))
    config = config_of(tmp_path)
    spec = config["recipe"]["rules"][-1][1]
    assert (config["start"], spec["rounding"], spec["corrected"]) == (
        start,
        *(("rtn", False) if start == "nearest" else ("gptq", True)),
    )
    assert all({"learned", "calibrated"} <= set(block["errors"]) for block in config["blocks"].values())
    assert files(tmp_path)["weights/mm1.npz"] != files(whole[0])["weights/mm1.npz"]


def test_sixteen_bits_write_no_activation_scales(calib, whole, tmp_path):
    succeed(*verb(calib, tmp_path, "--bits-a", 16, length=ONE))
    for name in ("mm0.npz", "mm1.npz"):
        with np.load(tmp_path / "weights" / name) as arrays:
            assert not [key for key in arrays if "__a_" in key]
    with np.load(whole[0] / "weights" / "mm0.npz") as arrays:
        paths = {key.split("__")[0] for key in arrays}
        scales = {key.split("__")[0]: arrays[key] for key in arrays if key.endswith("__a_scale")}
    assert {path for path in paths if "adaLN" not in path} == set(scales)
    assert {(value.shape, value.dtype.name) for value in scales.values()} == {((2,), "float32")}


def test_options_reach_the_optimiser(calib, whole, tmp_path):
    options = ("--qdrop", 0.5, "--pressure", 7, "--seed", 3, "--no-sensitivity", "--model", "mmdit-shapes")
    succeed(*verb(calib, tmp_path, *options))
    config = config_of(tmp_path)
    learning = config["recipe"]["learning"]
    assert {name: learning[name] for name in ("drop", "pressure", "seed")} == {"drop": 0.5, "pressure": 7, "seed": 3}
    assert config["recipe"]["sensitivity"] is False
    assert all(block["learning"]["flipped"] > 0 for block in config["blocks"].values() if block["kept"] == "learned")
    assert files(tmp_path)["weights/mm0.npz"] != files(whole[0])["weights/mm0.npz"]


def velocity(adapter):
    latent = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(1))
    text = adapter.encode(["a large red circle at left on white background", ""])
    return np.array(adapter.velocity(latent, text, 0.5))


def test_folds_are_rounded_with_and_computed_with(calib, tmp_path):
    """Eight-bit weights of a model whose SmoothQuant and migration were applied: divided on one side only, nothing
    would fit.
    """
    quant_config = calib / "activations" / "quant_config.json"
    decided = QuantConfig.read(quant_config)
    assert Q in decided.divisors
    assert FC2 in decided.migrations
    assert decided.divisors[Q].max() / np.median(decided.divisors[Q]) > 3
    succeed(*verb(calib, tmp_path, "--bits-w", 8, "--quant-config", quant_config, length=ONE))
    assert config_of(tmp_path)["quant_config"] == file_digest(quant_config)
    exact, adapter = velocity(spiky_adapter()), spiky_adapter()
    install(adapter, TrackFiles(tmp_path, quant_config).store(adapter, active=False), adapter.blocks)
    assert np.linalg.norm(velocity(adapter) - exact) / np.linalg.norm(exact) < 0.02
    np.testing.assert_array_equal(np.array(get_module(adapter.module, FC2).act_divisor), decided.migrations[FC2])
    with np.load(tmp_path / "weights" / "mm0.npz") as arrays:
        q, fc2 = (arrays[f"{path}__scale"][:, None] * arrays[f"{path}__weight_int"] for path in (Q, FC2))
        table = decided.tables(smoothed=True, migrated=True)[Q]
        np.testing.assert_array_equal(arrays[f"{Q}__a_scale"], table.step)
    plain = spiky_adapter().layers()
    for found, path, divisor in ((q, Q, decided.divisors[Q]), (fc2, FC2, decided.migrations[FC2])):
        folded = np.array(plain[path].weight) * divisor
        assert np.linalg.norm(found - folded) < 0.02 * np.linalg.norm(folded)


def test_a_config_of_other_trajectories_is_refused_before_any_work(calib, tmp_path):
    quant_config = tmp_path / "quant_config.json"
    decided = QuantConfig.read(calib / "activations" / "quant_config.json")
    decided.facts["calibration"] = "d" * 64
    decided.write(quant_config)
    message = fail(*verb(calib, tmp_path / "out", "--quant-config", quant_config))
    assert "come from different calibration data" in message
    assert "metadata.json" in message
    assert "check the path" in fail(*verb(calib, tmp_path / "out", "--quant-config", tmp_path / "none.json"))
    assert not (tmp_path / "out").exists()


def test_stale_and_damaged_caches_are_refused(calib, tmp_path, monkeypatch):
    shutil.copytree(calib, tmp_path / "c")
    sample = tmp_path / "c" / "adaround_cache" / "samples" / "0001_002.npz"
    sample.write_bytes(sample.read_bytes()[:-9])
    assert "0001_002.npz: sha256" in fail(*verb(tmp_path / "c", tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()
    ledger = BlockCache.read(sample.parents[1]).ledger
    ledger.save(complete=False)
    assert "run 'mlxquant cache-adaround-data' again, it resumes" in fail(*verb(tmp_path / "c", tmp_path / "out"))
    assert "run 'mlxquant cache-adaround-data' first" in fail(*verb(tmp_path / "none", tmp_path / "out"))
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))
    assert "are of mmdit-shapes with other weights" in fail(*verb(calib, tmp_path / "out"))
    assert "is of model 'mmdit-shapes', not of 'sd3-medium'" in fail(
        *verb(calib, tmp_path / "out", "--model", "sd3-medium")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--learning-rate", 0), "rate = 0.0 is out of range"), (("--pressure", -1), "pressure = -1.0 is out of range")],
)
def test_impossible_settings_are_one_clear_error(calib, tmp_path, options, message):
    assert message in fail(*verb(calib, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_defaults_stay_what_they_were():
    options = {option.name: option for option in adaround_optimize.command.params}
    assert {name: options[name].default for name in ("bits_w", "bits_a", "iters")} == {
        "bits_w": 4,
        "bits_a": "8",
        "iters": 1000,
    }
    assert all(options[name].required for name in ("cache_dir", "output_dir"))
