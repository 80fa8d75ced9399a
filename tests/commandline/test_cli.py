"""The command line: what it promises on success, and one clear error on everything else."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

import mlxquant
from mlxquant.commandline import cli
from mlxquant.errors import LIMIT, NumericsError
from mlxquant.files.checked import read_json
from mlxquant.models.shapes import adapter as mmdit_shapes
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.recipes.ladder import stands_for
from mlxquant.sweep.store import FolderStore

from support.command_line import fail, succeed
from support.tiny_pictures import tiny_adapter

PROMPT = "a large red circle at left on white background"
GOOD = stands_for("good-w4a16")
QUANTIZE = ["quantize", "--model", "mmdit-shapes", "--recipe", "gptq-w4a8", "--num-prompts", "1", "--steps", "2"]
SMALL = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny_pictures import tiny_adapter
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.recipes.ladder import stands_for
from mlxquant.sweep.store import FolderStore
MMDiTShapes.pretrained = classmethod(lambda cls, place="": tiny_adapter())
from mlxquant.commandline.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """Commands run on the tiny model: they are the same, only faster."""
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))


def test_quantize_then_generate(tmp_path):
    facts, _ = succeed(*QUANTIZE, "--out", tmp_path / "q")
    assert {"out", "recipe", "model_bytes", "bits_per_weight", "seconds_quantize", "peak_bytes", "kept"} <= set(facts)
    assert sorted(os.listdir(tmp_path)) == ["q"]
    picture = tmp_path / "a.png"
    succeed("generate", "--model", tmp_path / "q", "--prompt", PROMPT, "--seed", 7, "--steps", 2, "--output", picture)
    with Image.open(picture) as image:
        assert image.size == (32, 32)
    again = tmp_path / "b.png"
    succeed("generate", "--model", tmp_path / "q", "--prompt", PROMPT, "--seed", 7, "--steps", 2, "--output", again)
    assert picture.read_bytes() == again.read_bytes()
    facts, _ = succeed(
        "generate",
        "--model",
        tmp_path / "q",
        "--compare",
        "mmdit-shapes",
        "--prompt",
        PROMPT,
        "--steps",
        2,
        "--output",
        again,
    )
    assert facts["psnr_db"] > 0
    with Image.open(again) as image:
        assert image.width > 400


def test_own_prompts_and_overrides(tmp_path):
    (tmp_path / "p.txt").write_text(f"3\t{PROMPT}\n")
    facts, _ = succeed(
        *QUANTIZE, "--prompts", tmp_path / "p.txt", "--override", "*.mlp.fc2=w8a16", "--out", tmp_path / "q"
    )
    assert facts["recipe"] == "gptq-w4a8,*.mlp.fc2=w8a16"
    saved = read_json(tmp_path / "q" / "model.json", "quantized-model")
    assert saved["calibration"]["prompts"] == [[3, PROMPT]]


def test_only_what_was_beaten_is_called_worse(tmp_path):
    """A recipe that rounds to nearest tries nothing else."""
    facts, said = succeed(*QUANTIZE, "--recipe", "rtn-w8a16", "--out", tmp_path / "rtn")  # the last --recipe counts
    assert set(facts["kept"].values()) == {"rtn"}
    assert "was better" not in said


def test_demo_reports_what_later_checks_read(tmp_path):
    facts, _ = succeed("demo", "--out", tmp_path / "demo", "--num-prompts", 2, "--steps", 2)
    assert {"out", "comparison", "seconds", "peak_bytes", "recipes", "fp"} <= set(facts)
    assert set(facts["recipes"]) == {"rtn-w4a16", "gptq-w4a16", GOOD}
    for row in facts["recipes"].values():
        assert {"psnr_db", "accuracy", "bits_per_weight", "model_bytes", "seconds_quantize"} <= set(row)
    assert 0 <= facts["fp"]["accuracy"] <= 1
    assert sorted(os.listdir(tmp_path / "demo")) == sorted(["comparison.png", "report.json", *facts["recipes"]])
    assert sorted(os.listdir(tmp_path)) == ["demo"]
    report = read_json(tmp_path / "demo" / "report.json", "demo-report")
    assert report["recipes"] == facts["recipes"]
    with Image.open(facts["comparison"]) as image:
        assert np.asarray(image).std() > 5
    assert "--force" in fail("demo", "--out", tmp_path / "demo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "sd9"], "unknown model 'sd9'"),
        (["--recipe", "magic-w4a8"], "unknown recipe 'magic-w4a8'"),
        (["--override", "*.fc3=w8a8"], "matches none of the model's"),
        (["--steps", "0"], "0 is not in the range"),
        (["--steps", "-3"], "-3 is not in the range"),
        (["--num-prompts", "0"], "0 is not in the range"),
        (["--cfg-weight", "-1"], "-1"),
        (["--prompts", "none.txt"], "No such file"),
    ],
)
def test_bad_arguments_are_one_clear_error(tmp_path, change, message):
    assert message in fail(*QUANTIZE, "--out", tmp_path / "q", *change)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["x" * 3000], [f"--{'x' * 3000}"], ["inspect", "a", "x" * 3000]])
def test_what_is_not_understood_is_not_quoted_whole(arguments):
    *_, said = fail(*arguments).splitlines()
    assert said.startswith("Error: ")
    assert len(said) <= len("Error: ") + LIMIT


def test_empty_prompt_files_and_prompts_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("")
    assert "holds no prompts" in fail(*QUANTIZE, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "q")
    assert "--prompt is empty" in fail(
        "generate", "--model", "mmdit-shapes", "--prompt", " ", "--output", tmp_path / "a.png"
    )
    assert "cannot draw 'a cat'" in fail(
        "generate", "--model", "mmdit-shapes", "--prompt", "a cat", "--output", tmp_path / "a.png"
    )
    (tmp_path / "p.txt").write_text("1\ta tabby cat\n")
    assert "cannot draw 'a tabby cat'" in fail(*QUANTIZE, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "q")
    assert os.listdir(tmp_path) == ["p.txt"]


def test_unwritable_places_are_refused_before_work_starts(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file: File exists" in fail(*QUANTIZE, "--out", tmp_path / "file" / "q")
    generate = ["generate", "--model", "mmdit-shapes", "--prompt", PROMPT]
    assert "file: File exists" in fail(*generate, "--output", tmp_path / "file" / "a.png")
    assert "is a folder" in fail(*generate, "--output", tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_existing_output_is_kept_without_force(tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("precious")
    assert "--force" in fail(*QUANTIZE, "--out", tmp_path / "q")
    assert "not written by mlxquant" in fail(*QUANTIZE, "--out", tmp_path / "q", "--force")
    assert os.listdir(tmp_path / "q") == ["mine"]
    (tmp_path / "q" / "mine").unlink()
    succeed(*QUANTIZE, "--out", tmp_path / "q", "--force")
    assert sorted(os.listdir(tmp_path / "q")) == ["model.json", "weights.safetensors"]
    assert "folder of its own" in fail(*QUANTIZE, "--out", "/", "--force")


def test_nan_weights_are_one_clear_error(tmp_path, monkeypatch):
    def poisoned(cls, place=""):
        adapter = tiny_adapter()
        adapter.module.final_layer.linear.weight[0, 0] = float("nan")
        return adapter

    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(poisoned))
    assert "final_layer.linear.weight holds 1 NaN" in fail(*QUANTIZE, "--out", tmp_path / "q")
    assert "NaN" in fail(
        "generate", "--model", "mmdit-shapes", "--prompt", PROMPT, "--steps", "1", "--output", tmp_path / "a.png"
    )
    assert os.listdir(tmp_path) == []


def test_truncated_model_is_one_clear_error(tmp_path):
    succeed(*QUANTIZE, "--out", tmp_path / "q")
    weights = tmp_path / "q" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = fail("generate", "--model", tmp_path / "q", "--prompt", PROMPT, "--output", tmp_path / "a.png")
    assert "weights.safetensors" in message
    assert "write or download it anew" in message


def subprocess_run(tmp_path, *arguments, **options):
    script = SMALL.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_killed_quantize_resumes_to_the_same_bytes(tmp_path, stages):
    succeed(*QUANTIZE, "--out", tmp_path / "whole")
    work = tmp_path / "killed.partial" / "gptq-w4a8"
    process = subprocess_run(tmp_path, *QUANTIZE, "--steps", "2", "--out", tmp_path / "killed")
    deadline = time.monotonic() + 60
    while process.poll() is None and (not work.is_dir() or len(list(work.glob("*.safetensors"))) < stages):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists() or process.returncode == 0
    if not (tmp_path / "killed").exists():
        succeed(*QUANTIZE, "--out", tmp_path / "killed")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed.partial").exists()


def test_interrupt_says_how_to_go_on(tmp_path):
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs ignore it, and so would their children
    process = subprocess_run(tmp_path, "demo", "--out", tmp_path / "demo", "--steps", 60, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not (tmp_path / "demo.partial" / "calibration" / "0000.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Run the same command again" in stderr
    assert b"Traceback" not in stderr
    assert not (tmp_path / "demo").exists()


def test_progress_of_other_settings_is_not_used(tmp_path, monkeypatch):
    succeed(*QUANTIZE, "--out", tmp_path / "a")
    save = FolderStore.save

    def save_one_stage(self, stage, result):
        save(self, stage, result)
        raise NumericsError("stopped here")

    monkeypatch.setattr(FolderStore, "save", save_one_stage)
    assert "stopped here" in fail(*QUANTIZE, "--steps", "3", "--out", tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b.partial")) == ["blas.json", "calibration", "gptq-w4a8"]
    monkeypatch.setattr(FolderStore, "save", save)
    succeed(*QUANTIZE, "--out", tmp_path / "b")
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == (
        tmp_path / "b" / "weights.safetensors"
    ).read_bytes()


def test_paths_that_cannot_be_looked_at_are_one_clear_error(tmp_path):
    """What a folder without permission gives to anybody but root."""
    assert "File name too long" in fail(*QUANTIZE, "--out", tmp_path / ("x" * 300))
    assert "File name too long" in fail("generate", "--model", "y" * 300, "--prompt", PROMPT)


def test_impossible_guidance_is_one_clear_error(tmp_path):
    for value in ("inf", "nan"):
        assert "cfg weight" in fail(*QUANTIZE, "--cfg-weight", value, "--out", tmp_path / "q")
    assert os.listdir(tmp_path) == []


def test_more_prompts_than_there_are_is_one_clear_error(tmp_path):
    assert "1000 prompts" in fail("demo", "--num-prompts", "2000", "--steps", "1", "--out", tmp_path / "demo")


def test_every_verb_is_a_module_too():
    for verb in cli.VERBS:
        command = cli.main.get_command(click.Context(cli.main), verb)
        assert command.help
        module = cli.MODULES.get(verb, verb.replace("-", "_"))
        source = Path(mlxquant.__file__).with_name(f"{module}.py").read_text()
        assert source.endswith('if __name__ == "__main__":\n    command()\n')


def test_module_entry_point_prints_no_warning():
    done = subprocess.run(
        [sys.executable, "-m", "mlxquant.quantize", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "--recipe" in done.stdout
    assert subprocess.run(
        [sys.executable, "-m", "mlxquant", "--version"], capture_output=True, text=True, check=True
    ).stdout.startswith("mlxquant")


def test_embedded_weights_ship_with_the_package():
    assert (Path(mlxquant.__file__).parent / "assets" / mmdit_shapes.WEIGHTS).exists()
