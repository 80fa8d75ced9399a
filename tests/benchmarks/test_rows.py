"""benchmarks/rows.py: a row is measured once, files are whole, and neither a kill nor a neighbour loses a row."""

import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("rows")


def start(script, *arguments):
    """A process that has ``Rows`` of a model a, kept in its first argument."""
    head = f"import os, sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom pathlib import Path\nfrom rows import Rows\n"
    head += "kept = Rows(Path(sys.argv[1]), model='a')\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_row_is_made_once_and_rows_of_another_model_are_left_alone(rows, tmp_path):
    made = []

    def make(value):
        made.append(value)
        return {"psnr_each": (value, 2.5), "bits": value}

    one, other = (
        rows.Rows(tmp_path / "work", model="a", prompts=4),
        rows.Rows(tmp_path / "work.jsonl", model="b", prompts=4),
    )
    assert one.file == other.file == tmp_path / "work.jsonl"
    assert one.figures() == {}
    for _ in range(2):
        assert one.kept("gptq-w4a8", lambda: make(1)) == {"bits": 1, "psnr_each": [1, 2.5]}
        assert other.kept("gptq-w4a8", lambda: make(2)) == {"bits": 2, "psnr_each": [2, 2.5]}
    assert made == [1, 2]
    one.keep("gptq-w4a8", {"bits": 3})
    assert one.figures() == {"gptq-w4a8": {"bits": 3}}
    assert other.figures()["gptq-w4a8"]["bits"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["work.jsonl"]


def test_a_line_is_a_row_and_the_order_of_measuring_leaves_no_trace(rows, tmp_path):
    for work, names in (("one", "cab"), ("two", "abc")):
        kept = rows.Rows(tmp_path / work, prompts=4, model="a")
        for name in names:
            kept.keep(name, {"each": [1, 2], "psnr": 0.1})
    text = (tmp_path / "one.jsonl").read_text()
    assert text == (tmp_path / "two.jsonl").read_text()
    assert text.splitlines()[0] == '{"name": "a", "of": {"model": "a", "prompts": 4}, "psnr": 0.1, "each": [1, 2]}'
    assert list(kept.figures()) == ["a", "b", "c"]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    script = """
for name in "abc":
    def make():
        print("measured", name, flush=True)
        if name == sys.argv[2]:
            os.kill(os.getpid(), 9)
        return {"psnr": 1.0}
    kept.kept(name, make)
"""
    killed = start(script, tmp_path / "work", "b")
    assert killed.communicate(timeout=60)[0].split() == ["measured", "a", "measured", "b"]
    assert killed.returncode == -signal.SIGKILL
    assert start(script, tmp_path / "work", "nothing").communicate(timeout=60)[0].split() == [
        "measured",
        "b",
        "measured",
        "c",
    ]


def test_processes_that_share_a_file_lose_no_row(rows, tmp_path):
    script = "for i in range(40): kept.keep(f'{sys.argv[2]}{i}', {'psnr': i})"
    for process in [start(script, tmp_path / "work", name) for name in "ab"]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = rows.Rows(tmp_path / "work", model="a").figures()
    assert found == {f"{name}{i}": {"psnr": i} for name in "ab" for i in range(40)}


def test_a_row_that_is_no_json_leaves_the_file_as_it_was(rows, tmp_path):
    kept = rows.Rows(tmp_path / "work", model="a")
    kept.keep("one", {"psnr": 1.0})
    before = kept.file.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        kept.keep("two", {"psnr": float("nan")})
    assert kept.file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["work.jsonl"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"psnr": 1.0}'])
def test_a_line_that_is_no_row_is_named(rows, tmp_path, damage):
    kept = rows.Rows(tmp_path / "work", model="a")
    kept.keep("one", {"psnr": 1.0})
    kept.file.write_text(kept.file.read_text() + damage + "\n")
    with pytest.raises(click.ClickException, match="line 2 is no row"):
        kept.keep("two", {"psnr": 1.0})


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").iterdir()), ids=lambda file: file.name)
def test_committed_rows_are_as_a_benchmark_writes_them(rows, tmp_path, file):
    rows.write(tmp_path / file.name, rows.read(file))
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    names = [(row["name"], json.dumps(row["of"])) for row in rows.read(file)]
    assert len(set(names)) == len(names)
