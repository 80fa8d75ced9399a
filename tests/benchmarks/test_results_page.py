"""docs/results.md: its tables are what the rows in benchmarks/results say."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxquant.recipes.ladder import stands_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("results_page")


@pytest.fixture
def run(page_script, tmp_path):
    """Runs the script on a copy of the page and the rows."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "results.md")
    places = ["--page", str(tmp_path / "results.md"), "--results", str(tmp_path / "results")]
    return lambda *arguments: CliRunner().invoke(page_script.main, [*places, *arguments])


def test_the_page_is_what_the_rows_say(page_script):
    done = CliRunner().invoke(page_script.main, ["--check"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] == []


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def named(cell):
    """The last recipe that a cell names."""
    return cell.split("`")[-2]


def test_the_first_page_says_what_the_rows_say():
    table = (ROOT / "docs" / "results.md").read_text().split("<!-- generated: methods ")[1].split("<!-- end -->")[0]
    measured = {named(cells(line)[0]): cells(line) for line in table.splitlines() if line.startswith("| `")}
    shown = [
        cells(line) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `mmdit-shapes`")
    ]
    assert len(shown) == 7
    for _, recipe, quality, bits in shown:
        assert [bits, quality.replace(" dB", "")] == measured[named(recipe)][1:3]
        first, *others = recipe.split("`")[1::2]  # `good-w4a16`, which is `kron-w4a16`
        assert stands_for(first) == named(recipe) or not others


def test_a_changed_row_is_noticed_and_mended(run, tmp_path):
    file, page = tmp_path / "results" / "which_method.jsonl", tmp_path / "results.md"
    rows, before = [json.loads(line) for line in file.read_text().splitlines()], page.read_text()
    for row in rows:
        if row["name"] == "rtn-w4a8":
            row["obeyed"] = [0] * len(row["obeyed"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = run("--check")
    assert done.exit_code == 1
    assert done.stderr == f"Error: {page}: not what the rows say: methods; python benchmarks/results_page.py mends it\n"
    assert page.read_text() == before

    assert json.loads(run().stdout)["written"] == ["methods"]
    (old,) = set(before.splitlines()) - set(page.read_text().splitlines())
    assert old.startswith("| `rtn-w4a8` |")
    accuracy = old.split("|")[5]
    assert page.read_text() == before.replace(old, old.replace(accuracy, " 0.0% "))
    assert run("--check").exit_code == 0


def test_a_table_changed_by_hand_is_noticed(run, tmp_path):
    page = tmp_path / "results.md"
    page.write_text(page.read_text().replace("| 1.9075 |", "| 1.9074 |"))
    assert "not what the rows say: language;" in run("--check").stderr


def test_text_around_the_tables_stays(run, tmp_path):
    page = tmp_path / "results.md"
    before = page.read_text().replace("<!-- end -->", "\n<!-- end -->")
    page.write_text(f"First.\n{before}Last, without a line's end")
    assert run().exit_code == 0
    assert page.read_text() == f"First.\n{(ROOT / 'docs' / 'results.md').read_text()}Last, without a line's end"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- end -->", ""),
        ("<!-- generated: language ", "<!-- generated: languages "),
        ("<!-- generated: language ", "<!-- generated: methods "),
    ],
)
def test_marks_that_do_not_add_up_are_refused(run, tmp_path, old, new):
    page = tmp_path / "results.md"
    page.write_text(page.read_text().replace(old, new, 1))
    before = page.read_bytes()
    done = run()
    assert (done.exit_code, page.read_bytes()) == (1, before)
    assert "expected each of methods, language, peers, real-models, limits once" in done.stderr


def test_a_row_that_is_shown_must_be_there(run, tmp_path):
    file = tmp_path / "results" / "language.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if '"qat ternary"' not in line))
    assert "no row 'qat ternary', which the page shows" in run().stderr


def test_rows_of_two_models_are_refused(run, tmp_path):
    file = tmp_path / "results" / "language.jsonl"
    file.write_text(file.read_text().replace('"model": "b345daa3"', '"model": "00000000"', 1))
    assert "expected them to be of one" in run().stderr
