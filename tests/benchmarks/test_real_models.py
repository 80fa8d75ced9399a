"""Rows of a model that others trained: how maps are compared, and the tables that rows become."""

import json
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest

pytest.importorskip("scipy")
RNG = np.random.default_rng(0)
MAPS = RNG.normal(0, 3, 32)


@pytest.fixture
def script(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "examples"))
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return import_module("real_models")


def row(name, draw, mean, bits, seeds="100-131"):
    each = mean + MAPS + RNG.normal(0, 0.2, 32)
    return {
        "name": name, "of": {"model": "0", "seeds": seeds, "draw": draw}, "psnr_each": each.tolist(),
        "bits_per_weight": bits, "share_quantized": 0.9948, "seconds_quantize": 10.0,
    }  # fmt: skip


def written(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_difficulties_go_from_the_first_to_the_last(script):
    assert script.difficulties(4) == [1, 34, 67, 100]


def test_the_peak_is_the_height_of_the_exact_map(script):
    exact = np.stack([np.eye(4, dtype=np.float32) * height for height in (1, 10)])
    np.testing.assert_allclose(script.psnr(exact + np.float32(0.1), exact), [20, 40], atol=1e-4)


def test_tables_say_what_each_recipe_gains_over_rounding(script, tmp_path):
    rows = [row(f"rtn-{form}", draw, 20, 4.5) for form in ("w4a16", "w3a16") for draw in range(3)]
    rows += [row("gptq-w4a16", draw, 30, 4.5) for draw in range(3)] + [row("mixed-w4a16", 0, 20, 4.4)]
    found = script.measured(written(tmp_path, rows))
    lines = script.tables(script.summaries(found)).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line] == [
        "W4A16", "---", "`mixed-w4a16`¹", "`gptq-w4a16`", "`rtn-w4a16`", "W3A16", "---", "`rtn-w3a16`",
    ]  # fmt: skip
    mixed, calibrated, nearest = ([cell.strip() for cell in line.split("|")] for line in lines[2:5])
    assert calibrated[4].startswith(("+9.9", "+10.0"))
    assert mixed[4].endswith(", a tie")
    assert nearest[4] == ""
    assert calibrated[5] == "99.5%"


def test_rows_of_other_seeds_do_not_mix(script, tmp_path):
    rows = [row("rtn-w4a16", 0, 20, 4.5), row("gptq-w4a16", 0, 20, 4.5, seeds="0-31")]
    with pytest.raises(click.ClickException, match="expected them to be of one model and its seeds"):
        script.measured(written(tmp_path, rows))


def test_calibration_draws_none_of_the_maps_that_are_compared(script):
    calibrated = range(script.CALIBRATED, script.CALIBRATED + script.DRAWS * script.CALIBRATION)
    for first in (0, script.FIRST):
        assert not set(range(first, first + script.COUNT)) & set(calibrated)
    assert script.FIRST >= script.COUNT
