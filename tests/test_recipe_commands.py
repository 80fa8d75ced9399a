"""Commands with a fixed recipe: they parse, name it, and do what ``quantize`` and ``evaluate`` do."""

import subprocess
import sys

import pytest

import mlxquant as mq
from mlxquant import benchmark_final, calibrate_snr, quantize_qronos
from mlxquant.evaluate import command as evaluate
from mlxquant.files.checked import read_json
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.quantize import command as quantize
from mlxquant.recipes.grammar import parse_recipe

from support.command_line import fail, run, succeed
from support.tiny_pictures import tiny_adapter

QUICK = ["--num-prompts", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls: tiny_adapter()))


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


def test_every_option_they_pass_on_exists():
    """A renamed option of ``quantize`` or ``evaluate`` must not be passed in vain."""
    known = {parameter.name for parameter in quantize.params}
    assert {
        "name",
        "size",
        "recipe_name",
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


@pytest.mark.parametrize("module", [calibrate_snr, quantize_qronos, benchmark_final])
def test_they_run_as_modules(module):
    done = subprocess.run([sys.executable, "-m", module.__name__, "--help"], capture_output=True, text=True, check=True)
    assert "--model" in done.stdout
