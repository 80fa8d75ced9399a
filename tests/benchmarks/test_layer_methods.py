"""benchmarks/layer_methods.py: one JSON line last, true figures, whole files, and clear refusals."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from mlxquant.methods.weights.damping import CANDIDATES, TARGETS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layer_methods.py"


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "W.npy", random.standard_normal((24, 32)).astype(np.float32))
    np.save(tmp_path / "X.npy", random.standard_normal((100, 32)).astype(np.float32))
    np.save(tmp_path / "XT.npy", random.standard_normal((50, 32)).astype(np.float32))
    np.save(tmp_path / "narrow.npy", np.ones((100, 31), np.float32))
    np.save(tmp_path / "nan.npy", np.full((100, 32), np.nan, np.float32))
    return tmp_path


def run(folder, *arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_figures_are_those_of_the_weight_that_is_written(folder):
    arguments = "--w W.npy --x X.npy --xtest XT.npy --bits 3 --group-size 32 --damping 0.02 --out Q.npy --repeat 2"
    done = run(folder, *arguments.split())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    weight, inputs, test, quantized = (
        np.load(folder / f"{name}.npy").astype(np.float64) for name in ("W", "X", "XT", "Q")
    )
    for key, tokens in (("rel_error", inputs), ("rel_error_heldout", test)):
        assert report[key] == pytest.approx(
            np.linalg.norm(tokens @ (weight - quantized).T) / np.linalg.norm(tokens @ weight.T)
        )
    assert np.load(folder / "Q.npy").dtype == np.float32
    assert [report[key] for key in ("method", "steps", "bits", "group_size")] == ["gptq", "search", 3, 32]
    assert report["seconds"] > 0
    assert report["machine"]["numpy"] == np.__version__
    assert {file.name for file in folder.iterdir()} == {"W.npy", "X.npy", "XT.npy", "Q.npy", "narrow.npy", "nan.npy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--w missing.npy --x X.npy", "cannot read missing.npy"),
        ("--w W.npy --x narrow.npy", "found 31 columns, expected 32"),
        ("--w W.npy --x nan.npy", "NaN"),
        ("--w W.npy --x X.npy --method nope", "unknown round method 'nope'; known:"),
        ("--w W.npy --x X.npy --group-size 64", "groups of 64 do not divide an input width of 32"),
        ("--w W.npy --x X.npy --xq XT.npy", "found 50 tokens, expected the 100"),
        ("--w W.npy", "--w and --x go together"),
        ("--w W.npy --x X.npy --held-out --damping 0.1", "give one of them"),
        ("--w W.npy --x X.npy --method qronos", "cross"),
    ],
)
def test_bad_input_is_one_line_on_stderr(folder, arguments, message):
    done = run(folder, *arguments.split())
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_drawn_layer_with_two_inputs_and_dampings_chosen(folder):
    drawn = ["--data", "drawn", "--width", "48", "--tokens", "240", "--two-inputs"]
    reports = []
    for arguments in (
        "--method gptq",
        "--method qronos",
        "--method gptq-descent --corrected --held-out --refine --out Q.npy",
    ):
        done = run(folder, *drawn, *arguments.split())
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    plain, corrected, chosen = reports
    assert corrected["rel_error"] < 0.8 * plain["rel_error"]
    assert (plain["damping"], plain["damping_of_target"], plain["tokens"]) == (None, None, 240)
    assert chosen["damping"] in CANDIDATES
    assert chosen["damping_of_target"] in TARGETS
    names = ("W", "X_test", "X_test_quant")
    weight, exact, seen = (
        np.load(folder / "drawn/48-inputs-240-tokens" / f"{name}.npy").astype(np.float64) for name in names
    )
    outputs = exact @ weight.T
    error = np.linalg.norm(outputs - seen @ np.load(folder / "Q.npy").T.astype(np.float64)) / np.linalg.norm(outputs)
    assert chosen["rel_error_heldout"] == pytest.approx(error)


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_growth_is_timed_over_widths(method, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    benchmark = import_module("layer_methods")
    monkeypatch.setattr(benchmark, "WIDTHS", (32, 64))
    report = benchmark.growth(benchmark.Plan(benchmark.WeightFormat(4), "search", method), 2)
    assert report["widths"] == [32, 64]
    assert len(report["seconds"]) == 2
    assert report["powers"] == [pytest.approx(np.log2(report["seconds"][1] / report["seconds"][0]))]
