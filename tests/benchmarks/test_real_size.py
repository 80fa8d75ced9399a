"""benchmarks/real_size.py on tiny models: every stage, figures that add up, and no work lost to a kill; and that its
models at their real size are those that were published.
"""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxquant as mq

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAGES = ["write", "load-exact", "calibrate", "quantize", "load", "image"]
OPTIONS = ["--tiny", "--pixels", "64", "--num-prompts", "1", "--steps", "2"]
REAL = {  # parameters of what draws, tables of positions included where the files have them
    "pixart-alpha": 610_856_096,
    "sd15": 859_520_964,
    "sd3-medium": 2_084_951_104,
    "sd3.5-medium": 2_469_663_936,
}


def command(folder, *options, model="pixart-alpha"):
    return [sys.executable, BENCHMARKS / "real_size.py", "--model", model, "--work", folder, *OPTIONS, *options]


def run(folder, *options, **more):
    return subprocess.run(command(folder, *options, **more), capture_output=True, text=True, timeout=300)


@pytest.fixture
def random_folders(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("random_folders")


@pytest.mark.parametrize("name", REAL)
def test_the_real_size(random_folders, name):
    model = random_folders.MODELS[name]
    shapes = model.shapes(model.config)
    assert sum(map(math.prod, shapes.values())) == REAL[name]


@pytest.mark.diffusers
@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "real"])
@pytest.mark.parametrize("name", REAL)
def test_tensors_are_those_of_diffusers(random_folders, name, tiny):
    import diffusers
    import torch

    model = random_folders.MODELS[name]
    config = {**model.config, **(model.tiny if tiny else {})}
    with torch.device("meta"):
        theirs = getattr(diffusers, model.drawing[1]).from_config(config).state_dict()
    assert {path: tuple(value.shape) for path, value in theirs.items()} == model.shapes(config)


@pytest.mark.parametrize("name", ["sd15", "sd3-medium", "sd3.5-medium"])
def test_other_models_are_written_and_draw(random_folders, name, tmp_path):
    """Those that no other test takes to the end."""
    random_folders.write_model(tmp_path, name, tiny=True)
    adapter = mq.load(f"{name}@{tmp_path}", 64).adapter
    component, _ = random_folders.MODELS[name].drawing
    adapter.components.text = random_folders.stub_text(
        name, json.loads((tmp_path / component / "config.json").read_text())
    )
    picture = adapter.decode(adapter.generate(["a cat"], [3], 2))
    assert picture.shape == (1, 64, 64, 3)
    assert picture.std() > 0.05


@pytest.mark.diffusers
def test_the_same_prediction_as_diffusers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    against_torch, random_folders = map(importlib.import_module, ("against_torch", "random_folders"))
    monkeypatch.setattr(against_torch, "RUNS", 1)
    random_folders.write_model(tmp_path, "sd3.5-medium", tiny=True)
    found = against_torch.compare(tmp_path, "sd3.5-medium", 64)
    assert found["relative_difference"] < 1e-5
    assert found["ratio"] == found["medians"]["ours"] / found["medians"]["theirs"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
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
    assert stages["write"]["bytes"] == sum(map(len, contents(folder / "checkpoint").values()))
    assert stages["quantize"]["bytes"] == sum(map(len, contents(folder / "quantized").values()))
    model = mq.load(folder / "quantized")
    assert stages["quantize"]["bits_per_weight"] == pytest.approx(model.size.bits_per_weight)
    assert stages["load"]["layers"] == len(model.layers) > 20
    assert stages["image"]["finite"]
    assert np.asarray(Image.open(folder / "image.png")).shape == (64, 64, 3)


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
