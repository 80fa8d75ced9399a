"""Every module of ours says of itself that MLX's programs do not have it; names of parameters are spelled once."""

import re
from importlib import import_module
from pathlib import Path

import mlxquant  # before mlx

# isort: split
import mlx.nn as nn
import pytest

from mlxquant.layers import names
from mlxquant.layers.own import OwnModule
from mlxquant.layers.tree import Tap
from mlxquant.models.turned_norm import TurnedNorm

ROOT = Path(mlxquant.__file__).parent
MEASURING = {
    "StandIn",
    "Tap",
    "ShownAttention",
    "HalfLinear",
    "SoftLayer",
    "Twin",
}  # in a model only while something is measured
TRAINED = {"Perceptron"}  # in no model: its weights become a table's
PLAIN = {"SoftmaxAttention", "SwitchLinear"}  # what MLX computes


def sources(skip=()):
    for path in sorted(ROOT.rglob("*.py")):
        if path.stem != "__main__" and path.relative_to(ROOT).parts[0] not in skip:
            yield ".".join(["mlxquant", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"), path


def test_every_module_of_ours_says_so():
    """But for those of models, which belong to their host."""
    found = set()
    for name, path in sources(skip=["models"]):
        if any(base in path.read_text() for base in ("nn.", "(StandIn)")):
            members = vars(import_module(name)).values()
            found |= {kind for kind in members if isinstance(kind, type) and kind.__module__ == name}
    found.add(TurnedNorm)  # of any host's that was rotated
    ours = {kind for kind in found if issubclass(kind, nn.Module) and not kind.__name__.startswith("_")}
    assert Tap in ours
    assert {kind.__name__ for kind in ours if not issubclass(kind, OwnModule)} == MEASURING | TRAINED | PLAIN


def test_what_nobody_else_has_is_an_obstacle():
    (found,) = TurnedNorm(nn.RMSNorm(4), nn.Linear(4, 4).weight).obstacles()
    assert found.what == "a TurnedNorm, a layer of mlxquant's own"
    assert not found.activations


@pytest.mark.parametrize("name", [*names.FOR_INPUT, *names.BRANCH, names.DIVISOR])
def test_a_parameters_name_is_spelled_once(name):
    """In code; docstrings may speak of it."""
    where = [path.name for _, path in sources() if re.search(rf"[\"'.]{name}\b(?!`)", path.read_text())]
    assert where == ["names.py"]
