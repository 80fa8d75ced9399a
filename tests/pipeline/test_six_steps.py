"""The explicit pipeline from its first step to its last, and where known mistakes are tested for.

What went wrong in public TaQ-DiT scripts, and the test that would fail if it went wrong here:

- no straight-through estimator: ``sweep/test_reconstruction``: ``the_gradient_reaches_every_layer``,
  ``without_the_straight_through_estimator``
- a maximum used as a step, a zero point that ignored the lowest code: ``test_quant_config``:
  ``scale_is_a_step_and_every_code_is_used``
- a regulariser that outweighed all: ``methods/weights/test_adaround``: ``the_regulariser_does_not_swamp``
- modulations of other rows, no text: ``sweep/test_reconstruction``: ``a_minibatch_mixes_timesteps``,
  ``both_streams_count``
- an optimiser that only ran on fakes: here, ``the_optimiser_runs_the_real_block``
- rounding lost in the export: ``test_weight_files``: ``the_learned_rounding_survives``; here,
  ``what_was_learned_is_what_is_saved``
- a wrong start of alpha, and lost raw alphas: ``methods/weights/test_adaround``: ``it_starts_exactly_at_the_weight``,
  ``a_resumed_run``
- signed percentiles, a momentum of 0.95: ``laws/test_tier_laws``: ``a_mirrored_input``; ``test_activation_stats``:
  ``few_samples_do_not``
- curves below the maximum, clipping: ``grids/test_time``: ``between_levels_the_range_is_the_envelope``;
  ``test_decisions``: ``nothing_that_was_seen``
- layers skipped in silence, swallowed errors: here, ``no_step_leaves_a_layer_out``, ``errors_are_not_swallowed``
- other prompts: ``test_samples``: ``every_image_is_conditioned_on_its_own_prompt``
- manifests at the end, places, random numbers: here, ``folders_can_be_moved``,
  ``everything_is_a_function_of_the_settings``; all tests of resuming
- 152 GB of block inputs: ``test_cache_adaround_data``: ``the_folder_is_small``
- histograms of everything: ``test_activation_stats``: ``rows_are_spread``; ``test_cache_adaround_data``:
  ``one_forward_pass``
- metrics that measure nothing: not here, where pictures are compared with full precision's, pixel by pixel
  (``metrics/test_psnr``)
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.commandline import cli
from mlxquant.files.checked import file_digest
from mlxquant.layers.tree import set_module
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.pipeline.samples import Samples
from mlxquant.pipeline.weight_files import WeightFiles

from support.command_line import succeed
from support.six_steps import files, tiny_model
from support.tiny_pictures import tiny_adapter

PROMPT = "a large red circle at left on white background"
VERBS = (
    "generate-calibration-data",
    "cache-adaround-data",
    "adaround-optimize",
    "collect-layer-activations",
    "analyze-activations",
    "load-adaround-model",
)


def arguments(folder):
    """The six steps as the README shows them, smaller."""
    calib = folder / "calib"
    sampling = ["--model", "mmdit-shapes", "--num-images", 2, "--num-steps", 4, "--cfg-weight", 2]
    loading = [
        "--adaround-output",
        folder / "weights",
        "--quant-config",
        calib / "activations" / "quant_config.json",
        "--prompt",
        PROMPT,
    ]
    return dict(
        zip(
            VERBS,
            [
                [*sampling, "--calib-dir", calib],
                ["--calib-dir", calib, "--num-images", 2, "--stride", 2],
                [
                    "--cache-dir",
                    calib / "adaround_cache",
                    "--output-dir",
                    folder / "weights",
                    "--bits-w",
                    4,
                    "--bits-a",
                    8,
                    "--iters",
                    3,
                ],
                ["--calib-dir", calib, "--num-images", 2, "--stride", 2],
                ["--stats", calib / "activations" / "layer_statistics.json"],
                [
                    *loading,
                    "--num-steps",
                    2,
                    "--output-image",
                    folder / "a.png",
                    "--compare",
                    "--diff-stats",
                    "--save",
                    folder / "model",
                ],
            ],
            strict=True,
        )
    )


def make(folder):
    folder.mkdir()
    for verb, options in arguments(folder).items():
        succeed(verb, *options)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with tiny_model():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that the six steps write."""
    return make(tmp_path_factory.mktemp("pipeline") / "made")


def test_every_step_leaves_what_the_next_one_reads(made):
    expected = {
        "calib/manifest.json", "calib/samples/0000_000.npz", "calib/samples/0001_003.npz", "calib/latents/0001.npz",
        "calib/images/0001.png",
        "calib/adaround_cache/metadata.json", "calib/adaround_cache/samples/0000_000.npz",
        "calib/adaround_cache/samples/0001_002.npz",
        "weights/config.json", "weights/weights/mm0.npz", "weights/weights/mm1.npz",
        "calib/activations/layer_statistics.json", "calib/activations/timestep_stats/step_0.npz",
        "calib/activations/timestep_stats/step_2_index.json", "calib/activations/quant_config.json",
        "calib/activations/layer_temporal_analysis.json", "a.png", "a.diff.json", "model/model.json",
        "model/weights.safetensors",
    }  # fmt: skip
    assert expected <= set(files(made))
    with Image.open(made / "a.png") as image:
        assert image.width > 7 * 144
    quantized = mq.load(made / "model")
    assert quantized.images([mq.Prompt(1, PROMPT)], 2).shape == (1, 32, 32, 3)


def test_every_file_names_its_parents(made):
    """A folder made from other data is refused because of these; see each step's own tests."""
    calib = made / "calib"
    sha = {path.name: file_digest(path) for path in made.rglob("*.json")}
    cache, weights, statistics, config, analysis = (
        json.loads((made / name).read_text())
        for name in (
            "calib/adaround_cache/metadata.json", "weights/config.json", "calib/activations/layer_statistics.json",
            "calib/activations/quant_config.json", "calib/activations/layer_temporal_analysis.json",
        )
    )  # fmt: skip
    assert cache["parents"] == statistics["parents"] == {"manifest.json": sha["manifest.json"]}
    assert weights["parents"] == {"metadata.json": sha["metadata.json"]}
    assert config["made_from"]["parents"] == {"layer_statistics.json": sha["layer_statistics.json"]}
    assert analysis["parents"] == config["made_from"]["parents"]
    assert weights["calibration"] == config["made_from"]["calibration"] == Samples.read(calib).sha256


def test_everything_is_a_function_of_the_settings(made, tmp_path):
    """No unseeded random numbers, no times and no places in what is written."""
    assert files(make(tmp_path / "again")) == files(made)


def test_folders_can_be_moved(made, tmp_path):
    """Paths inside are relative, so that a finished step is finished wherever its folder lies."""
    for name, data in files(made).items():
        assert str(made).encode() not in data, name
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*.npz")}
    for verb in VERBS[:4]:
        succeed(verb, *arguments(moved)[verb])
    succeed(VERBS[5], *arguments(moved)[VERBS[5]], "--force")
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("*.npz")} == before
    assert files(moved) == files(made)


def test_no_step_leaves_a_layer_out(made):
    """A change of names could skip every layer, and nobody would notice."""
    adapter = tiny_adapter()
    blocks = {path for path in adapter.layers() if path.startswith("multimodal_transformer_blocks.")}
    main = {path for path in blocks if adapter.role(path) in ("attention", "mlp")}
    assert len(main) > 20
    learned = WeightFiles.read(made / "weights", adapter.blocks, {p: adapter.layers()[p] for p in blocks})
    assert set(learned.formats()) == blocks
    assert {path for path, format in learned.formats().items() if format.bits == 4} == main
    assert set(QuantConfig.read(made / "calib" / "activations" / "quant_config.json").plain) == main
    statistics = json.loads((made / "calib" / "activations" / "layer_statistics.json").read_text())
    assert set(statistics["layers"]) == main
    layers = mq.load(made / "model").layers
    assert set(layers) == blocks
    assert {path for path, layer in layers.items() if layer.table is not None} == main


def test_what_was_learned_is_what_is_saved(made):
    """Over the whole way: the codes of the weight track's files are those of the model that generate draws with."""
    layers = mq.load(made / "model").layers
    for name in ("mm0.npz", "mm1.npz"):
        with np.load(made / "weights" / "weights" / name) as arrays:
            paths = {key.split("__")[0] for key in arrays}
            for path in paths:
                expected = arrays[f"{path}__scale"][:, None] * arrays[f"{path}__weight_int"].astype(np.float32)
                np.testing.assert_array_equal(np.array(layers[path].dequantized()), expected)


def test_the_optimiser_runs_the_real_block(made, tmp_path):
    """With the block's modulation: the error that the optimiser reports is the one that the model has, measured here
    with the model's own forward pass on the trajectories, each row with its own conditioning.
    """
    cache, out = tmp_path / "cache", tmp_path / "weights"
    succeed("cache-adaround-data", *arguments(made)["cache-adaround-data"], "--tokens", 0, "--output-dir", cache)
    here = ["--cache-dir", cache, "--calib-dir", made / "calib", "--output-dir", out]
    succeed("adaround-optimize", *here, "--iters", 1, "--no-sensitivity")
    adapter = tiny_adapter()
    sigmas, states = Samples.read(made / "calib").calibration(2, 2).batches(adapter)
    embed, block = adapter.stages[:2]
    passes = Passes(adapter, sigmas)
    inputs = passes.through(embed, states)
    exact = passes.through(block, inputs)
    files = WeightFiles.read(out, adapter.blocks, adapter.layers())
    for path, layer in files.load(block, adapter.clock).layers.items():
        set_module(adapter.module, path, layer)
    quantized = passes.through(block, inputs)
    errors = []
    for stream in ("image", "text"):
        y, z = (np.stack([np.array(state[stream]) for state in side]) for side in (exact, quantized))
        errors.append(((z - y) ** 2).sum() / (y**2).sum())
    assert files.ledger.notes["blocks"]["mm0"]["error"] == pytest.approx(
        np.mean(errors), rel=0.05
    )  # what is cached is float16


def test_errors_are_not_swallowed():
    """An exception that is caught and dropped hides, say, modulation weights of zeros."""
    for path in Path(mq.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                assert not broad or isinstance(node.body[-1], ast.Raise), f"{path.name}, line {node.lineno}"


def test_every_step_is_a_module_and_a_verb():
    assert set(VERBS) <= set(cli.VERBS)
    processes = {
        verb: subprocess.Popen(
            [sys.executable, "-W", "error", "-m", f"mlxquant.{verb.replace('-', '_')}", "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )
        for verb in VERBS
    }
    for verb, process in processes.items():
        said, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, ""), verb
        shown = {str(option) for option in arguments(Path())[verb] if str(option).startswith("--")}
        assert {option for option in shown if option not in said} == set(), verb
