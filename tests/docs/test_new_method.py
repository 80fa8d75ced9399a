"""docs/new-method.md holds: its example, in a copy of the package, passes the laws and runs in a recipe."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxquant

TESTS = Path(__file__).parents[1]
GUIDE = TESTS.parent / "docs" / "new-method.md"
SMALL = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support.tiny_pictures import tiny_adapter
from mlxquant.models.shapes.adapter import MMDiTShapes
MMDiTShapes.pretrained = classmethod(lambda cls, place="": tiny_adapter())
"""


def block(title):
    """The code block of the guide whose first line is ``# title``, without it."""
    return re.search(rf"^```python\n# {re.escape(title)}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with the package and the guide's new file; what is not touched is linked."""
    package, source = tmp_path_factory.mktemp("extended") / "mlxquant", Path(mlxquant.__file__).parent
    package.mkdir()
    for path in source.iterdir():
        if path.name == "methods":
            shutil.copytree(path, package / "methods", ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    place = "methods/weights/squant.py"
    (package / place).write_text(block(f"src/mlxquant/{place}"))
    return package.parent


def python(extended, *arguments):
    """Standard output of Python with the extended package."""
    environment = os.environ | {"PYTHONPATH": str(extended), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_passes_the_laws(extended):
    laws = TESTS / "laws" / "test_rounding_laws.py"
    options = ["-q", "-k", "squant", "-p", "no:cacheprovider", "-c", TESTS.parent / "pyproject.toml"]
    said = python(extended, "-m", "pytest", laws, *options)
    assert int(re.search(r"(\d+) passed", said)[1]) > 30
    assert "failed" not in said


def test_the_example_runs_in_a_recipe_and_is_cited(extended):
    said = python(extended, "-c", SMALL + block("use"))
    assert float(said.splitlines()[0]) > 10
    assert "@inproceedings{guo2022squant," in said
    assert "@inproceedings{xiao2023smoothquant," in said


def test_the_example_is_listed(extended):
    assert '"name": "squant", "paper": "2202.07471"' in python(extended, "-m", "mlxquant", "methods", "--json")


def test_the_example_does_what_it_says(extended):
    said = python(
        extended,
        "-c",
        "import numpy as np\n"
        "import mlxquant\n"
        "from mlxquant.grids.weights import WeightFormat, fit_extremes\n"
        "from mlxquant.numerics.moments import Moments\n"
        "from mlxquant.methods.registry import get\n"
        "weight = np.random.default_rng(0).normal(size=(20, 64))\n"
        "grid = fit_extremes(weight, WeightFormat(4))\n"
        "common = Moments(np.ones((64, 64)) + 1e-6 * np.eye(64), 64)\n"
        "codes = [get('round', name).function(weight, grid, common) for name in ('rtn', 'squant')]\n"
        "print(*(np.abs((weight / grid.scales - (found - 8.0)).sum(1)).max() for found in codes))\n",
    )
    nearest, turned = map(float, said.split())
    assert turned <= 0.5 + 1e-6 < nearest


def test_every_kind_is_in_the_table():
    from mlxquant.methods.registry import KINDS

    named = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(KINDS)
