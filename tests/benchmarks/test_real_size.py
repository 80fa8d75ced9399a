"""benchmarks/sd3_real_size.py at the tiny size: every stage, figures that add up, and no work lost to a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import mlxquant as mq

from .conftest import BENCHMARKS

pytestmark = [pytest.mark.diffusionkit, pytest.mark.slow]
STAGES = ["write", "calibrate", "quantize", "load", "image"]
OPTIONS = ["--size", "tiny", "--host", "diffusionkit", "--pixels", "64", "--prompts", "1", "--steps", "2"]


def command(folder, *options):
    return [sys.executable, BENCHMARKS / "sd3_real_size.py", "--work", folder, *OPTIONS, *options]


def run(folder, *options):
    return subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(diffusionkit, tmp_path_factory):
    """A work folder in which everything is done, and what was said about it."""
    folder = tmp_path_factory.mktemp("real") / "work"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_stage_reports_its_figures(finished):
    folder, report = finished
    stages = report["stages"]
    assert sorted(stages) == sorted(STAGES)
    for facts in stages.values():
        assert 0 < facts["seconds"] <= facts["process_seconds"]
        assert facts["peak_bytes"] > 10e6
        assert len(facts["attempts"]) == 1
    for name in ("calibrate", "quantize"):
        assert 0 < sum(stages[name]["parts"].values()) <= stages[name]["seconds"]
    assert report["seconds"] == pytest.approx(sum(facts["process_seconds"] for facts in stages.values()))
    assert stages["calibrate"]["pairs"] == 2
    assert stages["write"]["bytes"] == (folder / "checkpoint" / "sd3_medium.safetensors").stat().st_size
    assert stages["quantize"]["bytes"] == sum(map(len, contents(folder / "quantized").values()))
    model = mq.load(folder / "quantized")
    assert stages["quantize"]["bits_per_weight"] == pytest.approx(model.size.bits_per_weight)
    assert stages["load"]["layers"] == len(model.layers) > 20
    assert stages["image"]["finite"]
    assert np.asarray(Image.open(folder / "image.png")).shape == (64, 64, 3)
    assert report["projection_512px_50_prompts_28_steps_seconds"]["calibrate"] > stages["calibrate"]["process_seconds"]


def test_what_is_done_is_not_done_again(finished):
    folder, report = finished
    before = contents(folder)
    done = run(folder)
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert contents(folder) == before
    assert "quantize" in done.stderr


def test_another_job_is_refused(finished):
    folder, _ = finished
    done = run(folder, "--recipe", "rtn-w4a16")
    assert done.returncode == 1
    assert "state.json is of another run" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_killed_run_goes_on_where_it_was(finished, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "quantized")
    (folder / "quantize.parts.json").unlink(missing_ok=True)
    state = json.loads((folder / "state.json").read_text())
    del state["stages"]["quantize"], state["spent"]["quantize"]
    (folder / "state.json").write_text(json.dumps(state))

    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    progress = folder / "quantized.partial" / "gptq-w4a8"
    wait(lambda: any(progress.glob("*.safetensors")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not alive(process.pid))  # its child ends itself
    assert any(progress.glob("*.safetensors"))
    assert not (folder / "quantized").exists()

    done = run(folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["stages"]["quantize"]
    assert len(report["attempts"]) == 2
    assert report["process_seconds"] == pytest.approx(sum(report["attempts"]))
    assert contents(folder / "quantized") == contents(finished[0] / "quantized")


def alive(group):
    """Whether a process of this group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
