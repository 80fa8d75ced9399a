"""The notebooks in examples/ have their outputs in them, are small, and run again from the first cell to the last.

Without nbclient and ipykernel they are not run, and where MLXQUANT_REQUIRE_NOTEBOOKS is set, as CI does, that is a
failure: ``pip install 'mlxquant[examples]'``.
"""

import ast
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import mlxquant

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(EXAMPLES.glob("*.ipynb"))]
PACKAGES = ("nbclient", "nbformat", "ipykernel")
LARGEST = 400_000  # bytes: a notebook is cloned by everybody
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def pictures(cells):
    return [
        kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {}) if kind.startswith("image/")
    ]


@every_notebook
def test_outputs_are_in_it_and_small(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(cells)) >= 2
    assert not [
        out for cell in cells for out in cell["outputs"] if out["output_type"] == "error" or out.get("name") == "stderr"
    ]
    assert path.stat().st_size < LARGEST


@pytest.mark.notebooks
@every_notebook
def test_it_runs(path, monkeypatch):
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_NOTEBOOKS") else pytest.skip
        refuse(f"{', '.join(missing)}: not installed")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(Path(mlxquant.__file__).parents[1]))
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    again = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert pictures(again) == pictures(code_cells(path))


def test_the_method_is_the_same_in_notebook_and_script():
    def method(source):
        return next(
            ast.dump(node)
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name == "principal"
        )

    told = next(
        text
        for cell in code_cells(EXAMPLES / "write_a_method.ipynb")
        if "def principal" in (text := "".join(cell["source"]))
    )
    assert method(told) == method((EXAMPLES / "own_method.py").read_text())
