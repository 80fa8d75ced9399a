"""Every script in examples/ runs, from its own command line, with settings that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

import mlxquant

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, DEMOS = ROOT / "examples", ROOT / "demos"
PACKAGE = Path(mlxquant.__file__).parents[1]


def python(*arguments, paths=(), cwd=ROOT):
    """Standard output of Python; fails with all that it said."""
    where = os.pathsep.join(map(str, (PACKAGE, *paths)))
    environment = os.environ | {"PYTHONPATH": where, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name, *arguments, **options):
    return python(EXAMPLES / name, *arguments, **options)


def test_a_picture_model(tmp_path):
    small = ("--prompts", 2, "--steps", 2, "--evaluate", 1)
    said = example("picture_model.py", *small, "--out", tmp_path)
    assert "draws the same picture: True" in said
    assert "@inproceedings{frantar2023gptq," in said
    rounded, calibrated = (
        float(re.search(rf"^{name} +([\d.]+) dB", said, re.MULTILINE)[1]) for name in ("rounded", "calibrated")
    )
    assert min(rounded, calibrated) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.png", "model"]


def test_a_language_model(tmp_path):
    said = example("language_model.py", "--samples", 4, "--windows", 2, "--out", tmp_path)
    rounded, calibrated = (float(lost) for lost in re.findall(r"([+-]\d+\.\d+) bits a character", said))
    assert calibrated < rounded
    assert (tmp_path / "mlx-lm" / "config.json").exists()


def test_any_module(tmp_path):
    said = example("any_module.py", "--iterations", 30, "--out", tmp_path)
    decibels = [float(value) for value in re.findall(r"([\d.]+) dB against", said)]
    assert len(decibels) == 4
    assert decibels == sorted(decibels, reverse=True)
    assert "draws the same: True" in said
    with Image.open(tmp_path / "digits.png") as sheet:
        assert sheet.size == (1280, 640)


def test_a_method_of_ones_own():
    said = example("own_method.py", "--prompts", 1, "--steps", 2, "--evaluate", 1)
    assert re.findall(r"^\S+", said, re.MULTILINE) == ["rtn+search-w4a16", "principal-w4a16", "gptq-w4a16"]


def test_that_method_passes_the_laws():
    options = ("-q", "-p", "no:cacheprovider", "-p", "own_method", "-k", "principal")
    said = python("-m", "pytest", *options, "tests/laws/test_rounding_laws.py", paths=(EXAMPLES,))
    assert int(re.search(r"(\d+) passed", said)[1]) > 30


def test_demos_lead_here():
    """tests/spin_quant/test_scripts.py runs them; here, that each has its example and nothing of its own."""
    assert {path.name for path in DEMOS.glob("*.py")} == {path.name for path in EXAMPLES.glob("spinquant_*.py")}
    for path in DEMOS.glob("*.py"):
        assert f'"examples" / "{path.name}"' in path.read_text()


def test_every_example_is_listed_and_says_how_to_run_it():
    listed = (EXAMPLES / "README.md").read_text()
    for path in (path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")):
        assert f"({path.name})" in listed
        if path.suffix == ".py":
            assert f"python examples/{path.name}" in path.read_text()
