"""Commands with recipes of their own: they parse, name them, and do what ``quantize`` and ``evaluate`` do."""

import subprocess
import sys

import numpy as np
import pytest

import mlxquant as mq
from mlxquant import benchmark_final, calibrate_snr, evaluate_compare, quantize_qronos, quantize_qronos_4blocks
from mlxquant.evaluate import command as evaluate
from mlxquant.files.checked import read_json
from mlxquant.layers.tree import parameters as parameters_of
from mlxquant.methods.inputs import time_networks
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.quantize import command as quantize
from mlxquant.recipes.grammar import parse_recipe

from support.command_line import fail, run, succeed
from support.tiny_pictures import tiny_adapter

QUICK = ["--num-prompts", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))
    monkeypatch.setattr(time_networks, "ITERATIONS", 1)  # of each layer's network over the log-SNR


def test_calibrate_snr_writes_a_model(tmp_path):
    facts, _ = succeed("calibrate-snr", "--abits", 8, "--wbits", 8, "--save-path", tmp_path / "q", *QUICK)
    assert facts["recipe"] == "rtn+logsnr-w8a8"
    model = mq.load(tmp_path / "q")
    tables = [layer.table for layer in model.layers.values() if layer.table is not None]
    assert tables
    assert all(set(table.bits) == {8} and (table.step > 0).all() for table in tables)
    assert model.images([mq.Prompt(1, "a large red circle at left on white background")], steps=2).shape == (
        1,
        32,
        32,
        3,
    )


def test_quantize_qronos_is_the_recipe_sequential_and_damped(tmp_path):
    facts, _ = succeed("quantize-qronos", "--save-path", tmp_path / "q", *QUICK)
    assert facts["recipe"] == "qronos+damped-w4a8"
    recipe = read_json(tmp_path / "q" / "model.json", "quantized-model")["recipe"]
    spec = recipe["rules"][-1][1]
    assert recipe["sequential"]
    assert (spec["rounding"], spec["held_out"], spec["weight"]["bits"], spec["activation"]["bits"]) == (
        "qronos",
        True,
        4,
        8,
    )


def test_quantize_qronos_4blocks_leaves_all_but_the_first_blocks_as_it_is(tmp_path):
    parameters = {parameter.name: parameter for parameter in quantize_qronos_4blocks.command.params}
    assert parameters["blocks"].default == 4
    facts, _ = succeed("quantize-qronos-4blocks", "--blocks", 1, "--save_path", tmp_path / "q", *QUICK)
    assert facts["recipe"] == "qronos+damped-w4a8,blocks=1"
    layers, whole = mq.load(tmp_path / "q").layers, tiny_adapter()
    first = whole.blocks[0]
    assert set(layers) == {path for path in whole.layers() if first.owns(path)}
    assert {layer.format.bits for path, layer in layers.items() if "adaLN" not in path} == {4}
    kept = parameters_of(mq.load(tmp_path / "q").adapter.module)
    for path, linear in whole.layers().items():
        if not first.owns(path):
            np.testing.assert_array_equal(np.array(kept[f"{path}.weight"]), np.array(linear.weight))


def test_as_many_blocks_as_there_are_leave_the_embedders_alone(tmp_path):
    count = len(tiny_adapter().blocks)
    succeed(
        "quantize",
        "--model",
        "mmdit-shapes",
        "--recipe",
        "rtn-w8a16",
        "--blocks",
        count,
        "--out",
        tmp_path / "q",
        *QUICK,
    )
    layers = mq.load(tmp_path / "q").layers
    assert layers.keys() == tiny_adapter().block_linears().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "rtn-w4a8", "--blocks", "99"], "--blocks 99: mmdit-shapes has 2; ask for as many or fewer"),
        (["--recipe", "rtn+softmax8-w4a8", "--blocks", "1"], "quantizes the attention of every block"),
    ],
)
def test_blocks_that_cannot_be_are_one_clear_error(tmp_path, options, message):
    assert message in fail("quantize", "--model", "mmdit-shapes", *options, "--out", tmp_path / "q", *QUICK)
    assert list(tmp_path.iterdir()) == []


def test_they_give_the_same_model_as_quantize(tmp_path):
    succeed("calibrate-snr", "--wbits", 4, "--abits", 6, "--save_path", tmp_path / "a", *QUICK)
    succeed("quantize", "--model", "mmdit-shapes", "--recipe", "rtn+logsnr-w4a6", "--out", tmp_path / "b", *QUICK)
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == (
        tmp_path / "b" / "weights.safetensors"
    ).read_bytes()


def test_the_folder_is_named_after_the_recipe_and_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts, _ = succeed("calibrate-snr", *QUICK)
    assert facts["out"] == "rtn+logsnr-w8a8"
    assert "--force" in fail("calibrate-snr", *QUICK)


@pytest.mark.parametrize("verb", ["calibrate-snr", "quantize-qronos"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--abits", "5"], "no specification"),
        (["--wbits", "9"], "no specification"),
        (["--model", "sd9"], "unknown model 'sd9'"),
        (["--prompts", "none.txt"], "No such file"),
    ],
)
def test_bad_arguments_are_one_clear_error(tmp_path, verb, change, message):
    assert message in fail(verb, "--save-path", tmp_path / "q", *QUICK, *change)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def evaluated(monkeypatch):
    """What ``evaluate`` was asked for, which is not done here."""
    seen = {}
    monkeypatch.setattr(evaluate, "callback", lambda **options: seen.update(options))
    return seen


def test_benchmark_final_compares_folders_with_their_baseline(tmp_path, evaluated):
    outcome = run(
        "benchmark-final",
        tmp_path / "a",
        "b",
        "--model",
        "sd3-medium",
        "--metric",
        "lpips",
        "--out",
        tmp_path / "report",
    )
    assert outcome.exit_code == 0, outcome.output
    assert evaluated["names"] == ("sd3-medium", str(tmp_path / "a"), "b")
    assert (evaluated["recipe_names"], evaluated["asked"]) == ((), ("lpips",))
    assert evaluated["out"] == tmp_path / "report"


def test_benchmark_final_without_folders_evaluates_four_recipes(evaluated):
    outcome = run("benchmark-final", "--num-prompts", 3)
    assert outcome.exit_code == 0, outcome.output
    assert evaluated["names"] == ("mmdit-shapes",)
    assert evaluated["recipe_names"] == benchmark_final.RECIPES
    assert (evaluated["num_prompts"], evaluated["floor"]) == (3, True)
    methods = {parse_recipe(name).name.split("-")[0] for name in benchmark_final.RECIPES}
    assert {"rtn+logsnr", "qronos+damped"} <= methods


def test_evaluate_compare_sets_log_snr_beside_other_scales_at_the_same_bits(evaluated):
    outcome = run("evaluate-compare")
    assert outcome.exit_code == 0, outcome.output
    assert evaluated["recipe_names"] == evaluate_compare.RECIPES
    recipes = [parse_recipe(name) for name in evaluate_compare.RECIPES]
    inputs = [recipe.rules[-1][1].activation for recipe in recipes]
    assert [(one.per_timestep, one.range) for one in inputs] == [
        (False, "extremes"),
        (True, "extremes"),
        (True, "tdq"),
        (True, "logsnr"),
    ]
    assert {(recipe.rules[-1][1].weight.bits, one.bits) for recipe, one in zip(recipes, inputs, strict=True)} == {
        (8, 8)
    }


def test_evaluate_compare_takes_models_that_are_there(tmp_path, evaluated):
    folder = tmp_path / "logsnr_checkpoints.pt"  # a folder with a name of torch's
    outcome = run("evaluate-compare", folder, "--num-prompts", 1)
    assert outcome.exit_code == 0, outcome.output
    assert (evaluated["names"], evaluated["recipe_names"]) == (("mmdit-shapes", str(folder)), ())
    assert evaluated["out"].name == "evaluate-compare"


def test_every_option_they_pass_on_exists():
    """A renamed option of ``quantize`` or ``evaluate`` must not be passed in vain."""
    known = {parameter.name for parameter in quantize.params}
    assert {
        "name",
        "size",
        "recipe_name",
        "blocks",
        "prompt_file",
        "num_prompts",
        "steps",
        "seed",
        "out",
        "force",
        "resume",
    } <= known
    known = {parameter.name for parameter in evaluate.params}
    assert {
        "names",
        "recipe_names",
        "size",
        "prompt_file",
        "num_prompts",
        "steps",
        "seed",
        "asked",
        "out",
        "force",
    } <= known


@pytest.mark.parametrize(
    "module", [calibrate_snr, quantize_qronos, quantize_qronos_4blocks, benchmark_final, evaluate_compare]
)
def test_they_run_as_modules(module):
    done = subprocess.run([sys.executable, "-m", module.__name__, "--help"], capture_output=True, text=True, check=True)
    assert "--model" in done.stdout
