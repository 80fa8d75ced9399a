"""``mlxquant evaluate``: its figures are those of everything else, and a killed run ends with the same report."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxquant as mq
from mlxquant.api import jobs
from mlxquant.errors import NumericsError
from mlxquant.evaluation import cost, half_precision, paired, report_folder
from mlxquant.evaluation.drawings import Drawings
from mlxquant.files.checked import read_json
from mlxquant.models.shapes.adapter import MMDiTShapes

from support.command_line import fail, succeed
from support.tiny_pictures import tiny_adapter

RECIPES = ["--recipe", "rtn-w4a8", "--recipe", "gptq-w4a8"]
EVALUATE = ["evaluate", "--model", "mmdit-shapes", *RECIPES, "--steps", 2, "--num-calibration-prompts", 1]
THREE = ["--num-prompts", 3]
SMALL = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny_pictures import tiny_adapter
from mlxquant.models.shapes.adapter import MMDiTShapes
MMDiTShapes.pretrained = classmethod(lambda cls, place="": tiny_adapter())
MMDiTShapes.batch = 2
from mlxquant.commandline.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """Commands run on the tiny model: they are the same, only faster. Pictures come in batches of two; pages are left
    out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))
        patch.setattr(MMDiTShapes, "batch", 2)
        patch.setattr(cost, "ROUNDS", 2)
        patch.setattr(cost, "STEPS", 2)
        patch.setattr(report_folder, "write_page", lambda folder: folder)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report on three prompts by a run that nothing stopped, what it said on stdout and on stderr."""
    folder = tmp_path_factory.mktemp("evaluate") / "r"
    facts, said = succeed(*EVALUATE, *THREE, "--out", folder)
    assert os.listdir(folder.parent) == ["r"]
    return folder, facts, said


def read(folder):
    return read_json(folder / "report.json", "evaluation")


def lasting(data, measured):
    """A report without what a clock or the memory says."""
    if isinstance(data, dict):
        return {key: lasting(value, measured) for key, value in data.items() if key not in measured}
    return [lasting(value, measured) for value in data] if isinstance(data, list) else data


def numbers(data):
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from numbers(value)
    elif isinstance(data, float):
        yield data


def test_report_holds_what_it_promises(whole):
    folder, facts, said = whole
    report = read(folder)
    assert [row["recipe"] for row in report["results"]] == ["rtn-w4a8", "gptq-w4a8"]
    promised = {
        "psnr_db",
        "ssim",
        "accuracy",
        "bits_per_weight",
        "model_bytes",
        "seconds_quantize",
        "latency_s",
        "peak_bytes",
    }
    for row in report["results"]:
        assert all(row[key] > 0 for key in promised - {"accuracy"})
        assert 0 <= row["accuracy"] <= 1
        for key in ("psnr_db", "ssim", "accuracy"):
            low, high = row[f"{key}_interval"]
            assert low - 1e-9 <= np.mean(row["each"][key]) <= high + 1e-9
            assert len(row["each"][key]) == 3
        assert row["latency_p95_s"] >= row["latency_s"]
        assert row["trajectory"][0] == 0 < row["trajectory"][-1]
        assert len(row["trajectory"]) == len(report["trajectory_sigma"]) == 3
    assert report["reference"]["psnr_db"] is None
    assert report["reference"]["latency_ratio"] == 1
    assert report["noise_floor"]["psnr_db"] > report["results"][0]["psnr_db"]
    assert [(row["metric"], row["a"], row["b"]) for row in report["differences"]] == [
        ("psnr_db", "gptq-w4a8", "rtn-w4a8"),
        ("ssim", "gptq-w4a8", "rtn-w4a8"),
        ("accuracy", "gptq-w4a8", "rtn-w4a8"),
        ("accuracy", "rtn-w4a8", "mmdit-shapes"),
        ("accuracy", "gptq-w4a8", "mmdit-shapes"),
    ]
    assert all(math.isfinite(value) for value in numbers(report))
    assert [method["name"] for method in report["methods"]] == ["round gptq"]
    assert facts["results"][1]["psnr_db"] == report["results"][1]["psnr_db"]
    assert "gptq-w4a8" in said
    for name in ("mmdit-shapes", "rtn-w4a8", "gptq-w4a8", "float16"):
        with Image.open(folder / "images" / name / "0002.png") as image:
            assert image.size == (32, 32)
    with (folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["mmdit-shapes", "rtn-w4a8", "gptq-w4a8"]
    assert float(rows[2]["psnr_db"]) == report["results"][1]["psnr_db"]
    assert rows[0]["psnr_db"] == ""


def test_figures_are_those_of_the_notebook_and_so_of_the_demo(whole):
    """The same calibration and prompts by way of ``mq.compare``."""
    model = mq.load("mmdit-shapes")
    calib = mq.calibrate(model, prompts=1, steps=2)
    others = {name: mq.quantize(model, calib, name) for name in ("rtn-w4a8", "gptq-w4a8")}
    comparison = mq.compare(model, others, model.adapter.prompts("evaluation", 3), steps=2)
    report = read(whole[0])
    assert report["reference"]["attributes"] == comparison.accuracy["FP"]
    for row in report["results"]:
        assert row["psnr_db"] == comparison.psnr_db[row["name"]].mean()
        assert row["each"]["psnr_db"] == comparison.psnr_db[row["name"]].tolist()
        assert row["each"]["accuracy"] == comparison.accuracy_each[row["name"]]
        assert row["accuracy"] == comparison.accuracy[row["name"]]["mean"]
        size = others[row["name"]].size
        assert (row["model_bytes"], row["bits_per_weight"]) == (size.model_bytes, size.bits_per_weight)


def test_saved_models_are_judged_as_their_recipe_is(whole, tmp_path):
    """What a report keeps under ``models`` draws the same again; two models of one name are told apart."""
    saved = whole[0] / "models" / "gptq-w4a8"
    succeed(
        "evaluate",
        "--model",
        "mmdit-shapes",
        "--model",
        saved,
        "--model",
        saved,
        "--steps",
        2,
        *THREE,
        "--no-floor",
        "--out",
        tmp_path / "r",
    )
    first, again = read(whole[0])["results"][1], read(tmp_path / "r")["results"]
    assert [row["name"] for row in again] == ["gptq-w4a8", "gptq-w4a8-2"]
    for row in again:
        assert {**row["each"], "recipe": row["recipe"]} == {**first["each"], "recipe": "gptq-w4a8"}
        assert row["seconds_quantize"] is None
    assert read(tmp_path / "r")["noise_floor"] is None
    assert not (tmp_path / "r" / "models").exists()
    assert sorted(os.listdir(tmp_path / "r" / "layers")) == ["gptq-w4a8-2.json", "gptq-w4a8.json"]


def test_one_picture_has_figures_without_intervals(tmp_path):
    succeed(*EVALUATE, "--num-prompts", 1, "--out", tmp_path / "r")
    report = read(tmp_path / "r")
    assert report["results"][0]["psnr_db_interval"] is None
    assert report["results"][0]["psnr_db"] > 0
    assert report["notes"] == ["One picture only: its figures have no intervals."]


def test_a_reference_that_overflows_in_float16_has_no_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(half_precision, "rounded", lambda x: x * float("inf"))
    succeed(*EVALUATE, "--num-prompts", 1, "--out", tmp_path / "r")
    report = read(tmp_path / "r")
    assert report["noise_floor"] is None
    assert "in float16 the reference overflows" in report["notes"][0]
    assert not (tmp_path / "r" / "images" / "float16").exists()


def test_metrics_that_are_asked_for_but_lack_their_network_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    message = fail(*EVALUATE, "--metric", "lpips", "--out", tmp_path / "r")
    assert message.startswith("Error: ")
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "r.partial").exists()


def stop_after(monkeypatch, owner, name, count):
    """Let a method be called ``count`` times, then fail as if the run was killed there."""
    method, calls = getattr(owner, name), []

    def limited(*arguments, **options):
        calls.append(arguments)
        if len(calls) > count:
            raise NumericsError("stopped here")
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, limited)
    return calls


def same_report(folder, whole):
    """Whether a report equals another but for what was measured, and all of its layer reports and pictures do."""
    one, other = read(folder), read(whole)
    assert lasting(one, other["measured"]) == lasting(other, other["measured"])
    names = [
        path.relative_to(whole)
        for kind in ("layers", "images", "models")
        for path in (whole / kind).rglob("*")
        if path.is_file()
    ]
    assert len(names) > 10
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("owner", "name", "count", "draws", "sweeps"),
    [(jobs, "quantized", 1, 8, 1), (Drawings, "_draw", 5, 3, 0), (paired, "layer_report", 1, 0, 0)],
)
def test_a_run_that_stops_anywhere_goes_on_to_the_same_report(
    whole, tmp_path, monkeypatch, owner, name, count, draws, sweeps
):
    with monkeypatch.context() as patch:
        stop_after(patch, owner, name, count)
        assert "stopped here" in fail(*EVALUATE, *THREE, "--out", tmp_path / "r")
    assert os.listdir(tmp_path) == ["r.partial"]
    with monkeypatch.context() as patch:
        drawn, swept = stop_after(patch, Drawings, "_draw", 100), stop_after(patch, jobs, "quantized", 100)
        succeed(*EVALUATE, *THREE, "--out", tmp_path / "r")
    assert (len(drawn), len(swept)) == (draws, sweeps)
    same_report(tmp_path / "r", whole[0])
    assert os.listdir(tmp_path) == ["r"]


def test_killed_run_ends_with_the_same_report(whole, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SMALL.format(tests=str(Path(__file__).parent)),
            *map(str, EVALUATE),
            *map(str, THREE),
            "--out",
            tmp_path / "r",
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list((tmp_path / "r.partial" / "drawings").glob("*/*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    succeed(*EVALUATE, *THREE, "--out", tmp_path / "r")
    same_report(tmp_path / "r", whole[0])
    assert os.listdir(tmp_path) == ["r"]


def test_what_another_job_left_is_not_used_and_damage_is_one_clear_error(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, Drawings, "_draw", 3)
        fail(*EVALUATE, *THREE, "--seed", 5, "--out", tmp_path / "r")
    damaged = tmp_path / "r.partial" / "drawings" / "rtn-w4a8" / "0000.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-5])
    message = fail(*EVALUATE, *THREE, "--out", tmp_path / "r")
    assert "0000.safetensors" in message
    assert "--no-resume" in message
    damaged.write_bytes(data)
    succeed(*EVALUATE, *THREE, "--out", tmp_path / "r")
    same_report(tmp_path / "r", whole[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mmdit-shapes"], "alone has nothing to be compared with"),
        (["--model", "sd9", "--recipe", "rtn-w4a8"], "unknown model 'sd9'"),
        (["--model", "mmdit-shapes", "--recipe", "magic-w4a8"], "unknown recipe 'magic-w4a8'"),
        (["--model", "mmdit-shapes", "--recipe", "rtn-w4a8", "--prompts", "none.txt"], "No such file"),
        (["--model", "mmdit-shapes", "--recipe", "rtn-w4a8", "--num-prompts", "0"], "0 is not in the range"),
        (["--model", "mmdit-shapes", "--recipe", "rtn-w4a8", "--metric", "vmaf"], "vmaf"),
        (
            ["--model", "sd9", "--recipe", "rtn-w4a8", "--metric", "fid", "--weights", "fid=none.pth"],
            "none.pth: no such file or folder",
        ),
    ],
)
def test_bad_arguments_are_one_clear_error(tmp_path, arguments, message):
    assert message in fail("evaluate", *arguments, "--out", tmp_path / "r")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_kept_without_force(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_text(json.dumps({"precious": True}))
    assert "--force" in fail(*EVALUATE, "--num-prompts", 1, "--out", tmp_path / "r")
    succeed(*EVALUATE, "--num-prompts", 1, "--no-floor", "--force", "--out", tmp_path / "r")
    assert read(tmp_path / "r")["prompts"][0]["index"] == 0
