"""benchmarks/sd3_real_size.py on our own host, at the tiny size of SD3.5; on DiffusionKit's: tests/host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sd3_real_size.py"
SMALL = ("--pixels", "64", "--prompts", "1", "--steps", "2")


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    done = run("--work", tmp_path / "work", "--size", "tiny-3.5", *SMALL)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert sorted(report["stages"]) == ["calibrate", "image", "load", "quantize", "write"]
    assert report["stages"]["image"]["finite"]
    assert report["stages"]["load"]["layers"] == 36
    assert json.loads((tmp_path / "work" / "quantized" / "model.json").read_text())["model"]["name"] == "sd3.5-medium"


def test_diffusionkit_has_no_sd35(tmp_path):
    done = run("--work", tmp_path / "work", "--size", "tiny-3.5", "--host", "diffusionkit", *SMALL)
    assert done.returncode == 2
    assert "DiffusionKit does not run tiny-3.5; leave --host out" in done.stderr
    assert not (tmp_path / "work").exists()
