"""benchmarks/mutants.py: its list fits the code and the tests as they are, and a verdict is what pytest says."""

import ast
import subprocess
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = {
    "exporters",
    "recipes",
    "methods",
    "sweep",
    "layers",
    "metrics",
    "files",
    "grids",
    "numerics",
    "sampling",
    "models",
    "api",
    "calibration",
    "curvature",
}


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("mutants")


def functions(file):
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_mutant_is_a_mistake_in_the_code_as_it_is(mutants):
    listed = mutants.read()
    for mutant in listed:
        mutant.applied((REPOSITORY / mutants.PACKAGE / mutant.file).read_text(encoding="utf-8"))
    found = Counter(mutant.file.partition("/")[0] for mutant in listed)
    assert set(found) == FOLDERS
    assert sum(found.values()) >= 150


def test_the_tests_that_are_to_notice_it_exist(mutants):
    for test in {test for mutant in mutants.read() for test in mutant.tests}:
        file, _, name = test.partition("::")
        assert (REPOSITORY / mutants.TESTS / file).is_file(), test
        assert not name or name in functions(REPOSITORY / mutants.TESTS / file), test


def test_few_may_survive(mutants):
    listed = mutants.read()
    assert sum(bool(mutant.reason) for mutant in listed) <= mutants.SURVIVING * len(listed)


@pytest.fixture
def tree(tmp_path):
    """A repository of a function and its test."""
    for name, text in {
        "src/mlxquant/__init__.py": "",
        "src/mlxquant/half.py": "def half(x):\n    while x < 0:\n        x = -x\n    return x / 2\n",
        "tests/test_half.py": "from mlxquant.half import half\ndef test_half():\n    assert half(4) == half(-4) == 2\n",
    }.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "here", check=True)
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("old", "new", "killed", "by"),
    [
        ("x / 2", "x // 3", True, "test_half.py::test_half"),
        ("x / 2", "x * .5", False, ""),
        ("x = -x", "x = +x", True, "time"),
        ("return x / 2", "return y", True, "test_half.py::test_half"),
    ],
)
def test_a_verdict_is_that_of_the_tests_and_leaves_both_trees(mutants, tree, tmp_path, old, new, killed, by):
    before = {path: path.read_bytes() for path in tree.rglob("*.py")}
    copy = tmp_path / "copy"
    mutants.copy_tree(tree, copy)
    mutant = mutants.Mutant("a mistake", "half.py", old, new, ("test_half.py",))
    assert mutants.run_tests(copy, mutant.tests) == (mutants.PASSED, "")
    found = mutants.verdict(copy, mutant, limit=3 if by == "time" else 60)
    assert (found["killed"], found["by"]) == (killed, by)
    for path, content in before.items():
        assert path.read_bytes() == (copy / path.relative_to(tree)).read_bytes() == content


def test_what_does_not_fit_is_refused(mutants):
    def of(old, new):
        return mutants.Mutant("a mistake", "half.py", old, new, ())

    with pytest.raises(ValueError, match="stands there 2 times"):
        of("x", "y").applied("x = x\n")
    with pytest.raises(SyntaxError):
        of("1", "(").applied("x = 1\n")


def test_a_verdict_holds_until_code_or_tests_change(mutants, tree):
    mutant = mutants.Mutant("a mistake", "half.py", "x / 2", "x", ("test_half.py",))
    before = mutant.state(tree)
    (tree / "src/mlxquant/__init__.py").write_text("# another file\n")
    assert mutant.state(tree) == before
    for name in ("src/mlxquant/half.py", "tests/test_half.py"):
        (tree / name).write_text((tree / name).read_text() + "\n")
        assert mutant.state(tree) != before
        before = mutant.state(tree)
