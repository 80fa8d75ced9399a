"""The tables of recipes: by size, with ties, with what is simulated and what has one draw marked."""

import json
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest

pytest.importorskip("scipy")
RNG = np.random.default_rng(0)
PROMPTS = RNG.normal(0, 3, 64)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("which_method")


def row(name, draw, mean, bits, prompts="64-127"):
    each = mean + PROMPTS + RNG.normal(0, 0.2, 64)
    return {
        "name": name, "of": {"model": "0", "prompts": prompts, "draw": draw}, "psnr_each": each.tolist(),
        "asked": [5] * 64, "obeyed": [4] * 64, "bits_per_weight": bits, "activation_bits": 8.0,
        "seconds_quantize": 10.0 * (draw + 1),
    }  # fmt: skip


EXACT = {
    "name": "full precision", "of": {"model": "0", "prompts": "64-127", "draw": 0}, "asked": [5, 6], "obeyed": [5, 5],
}  # fmt: skip


def written(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_tables_go_by_size_and_say_what_is_a_tie(script, tmp_path):
    rows = [EXACT]
    for draw, shift in enumerate((-0.1, 0.0, 0.1)):
        rows += [
            row("gptq-w4a8", draw, 44 + shift, 5.93), row("rtn-w4a8", draw, 37 + shift, 5.93),
            row("svdquant-w4a8", draw, 56 + shift, 9.75), row("gptq+dynamic-w4a8", draw, 44 + shift, 5.94),
        ]  # fmt: skip
    rows.append(row("taqdit-w4a8@300", 0, 45, 5.92))
    found, exact = script.measured(written(tmp_path, rows))
    assert exact == 10 / 11
    lines = script.tables(script.summaries(found)).splitlines()
    assert lines[0].startswith("| W4A8 | bits a weight")
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["`taqdit-w4a8@300`¹", "`gptq-w4a8`", "`rtn-w4a8`", "`gptq+dynamic-w4a8`†", "`svdquant-w4a8`"]
    against = [line.split("|")[4].strip() for line in lines[2:]]
    assert against[1] == ""
    assert [line.endswith(", a tie") for line in against] == [False, False, False, True, False]
    assert float(against[2].split()[0]) == pytest.approx(-7, abs=0.2)
    assert lines[3].split("|")[5].strip() == "80.0%"
    assert script.summaries(found)["gptq-w4a8"]["seconds_quantize"] == 20  # over draws


def test_differences_are_over_the_draws_that_both_have(script):
    base = [row("gptq-w4a8", draw, mean, 5.9) for draw, mean in enumerate((40, 50, 60))]
    other = [row("taqdit-w4a8@300", 0, 41, 5.9)]
    assert script.summary(other, base)["gain_db"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("name", "simulated"),
    [
        ("gptq-w4a8", False), ("gptq-w4a8-g64", True), ("gptq-w4a16-g64", False), ("gptq+dynamic-w4a8", True),
        ("gptq+softmax8-w4a8", True), ("mixed-w4a8", False), ("gptq-w4a8-token", False),
    ],
)  # fmt: skip
def test_what_is_no_integer_arithmetic_is_marked(script, name, simulated):
    assert script.simulated(name) is simulated


def test_every_row_is_a_recipe_with_a_base(script):
    names = script.rows()
    assert len(names) == len(set(names))
    assert {f"gptq-{script.format_of(name)}" for name in names} <= set(names)
    for name in names:
        script.mq.parse_recipe(name.partition("@")[0])


def test_rows_of_other_prompts_are_refused(script, tmp_path):
    rows = [EXACT, row("gptq-w4a8", 0, 44, 5.9, "0-63")]
    with pytest.raises(click.ClickException, match="expected them to be of one model and its prompts"):
        script.measured(written(tmp_path, rows))
    with pytest.raises(click.ClickException, match="no row 'full precision'"):
        script.measured(written(tmp_path, [row("gptq-w4a8", 0, 44, 5.9)]))
