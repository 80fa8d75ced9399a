"""benchmarks/real_size.py on DiffusionKit's modules, tiny; on our own hosts: tests/benchmarks."""

import json
import subprocess
import sys

import pytest

from .conftest import BENCHMARKS

pytestmark = [pytest.mark.diffusionkit, pytest.mark.slow]


def test_every_stage_runs(diffusionkit, tmp_path):
    options = ("--model", "sd3-medium-diffusionkit", "--work", tmp_path / "work", "--tiny")
    small = ("--pixels", "64", "--num-prompts", "1", "--steps", "2")
    command = [sys.executable, BENCHMARKS / "real_size.py", *options, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["stages"]["image"]["finite"]
    assert report["stages"]["load"]["layers"] == report["stages"]["load-exact"]["layers"] == 32
    assert json.loads((tmp_path / "work" / "quantized" / "model.json").read_text())["model"]["name"] == options[1]
    refused = subprocess.run([*command, "--torch"], capture_output=True, text=True, timeout=60)
    assert (refused.returncode, "--torch is about the folders that diffusers reads" in refused.stderr) == (2, True)
