"""benchmarks/layer_methods.py: one JSON line last, true figures, whole files, and clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    weight, inputs, test, quantized = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("W", "X", "XT", "Q"))
    for key, tokens in (("rel_error", inputs), ("rel_error_heldout", test)):
        assert report[key] == pytest.approx(np.linalg.norm(tokens @ (weight - quantized).T) / np.linalg.norm(tokens @ weight.T))
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
    ],
)
def test_bad_input_is_one_line_on_stderr(folder, arguments, message):
    done = run(folder, *arguments.split())
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
