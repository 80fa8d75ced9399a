"""The house: doors at the top, nouns in folders with a charter, imports in one direction and in no circle."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import mlxquant
from mlxquant.commandline.cli import MODULES, VERBS

from support.layout import FOLDERS, GROUND

ROOT = Path(mlxquant.__file__).parent
DOORS = [MODULES.get(verb, verb.replace("-", "_")) for verb in VERBS]
KNOW_NOT = {
    "methods": {"models", "layers"},
    "models": {"methods"},
}  # methods never name a model, models never name a method


def files():
    """Dotted names inside the package, and paths; a package goes by its own name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES_OF = dict(files())


def imports(name, path):
    """Modules of the package that a file imports, also inside of functions and for type checkers, as dotted names
    inside it.
    """
    package = [*name.split(".")] if path.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {dotted for alias in node.names if (dotted := ".".join([*base, alias.name])) in MODULES_OF} or {
                ".".join(base)
            }
    return found - {name}


IMPORTS = {name: imports(name, path) for name, path in MODULES_OF.items()}


def rank(name):
    """A place in the order of imports: the ground, the folders, then the doors and what they share."""
    top = name.split(".")[0]
    if name.endswith("__main__") or top not in [*GROUND, *FOLDERS]:
        return len(FOLDERS) + 1
    return 0 if top in GROUND else 1 + FOLDERS.index(top)


def test_doors_at_the_top():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == {*DOORS, *GROUND, "__init__", "__main__", "_recipe_command"}
    assert len(top) <= 30
    assert all(import_module(f"mlxquant.{door}").command.name == verb for door, verb in zip(DOORS, VERBS, strict=True))


def test_folders_have_a_charter_and_an_order():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*FOLDERS, "assets"}
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("folder", [*FOLDERS, *(f"methods/{kind}" for kind in ("weights", "inputs", "transforms"))])
def test_no_folder_is_a_heap(folder):
    assert len(list((ROOT / folder).glob("*.py"))) <= 22


def test_imports_run_one_way():
    for name, targets in IMPORTS.items():
        for target in targets:
            inside = name.split(".")[0] == target.split(".")[0] != ""
            assert inside or not name or rank(target) < rank(name) or rank(name) > len(FOLDERS), (
                f"{name} imports {target}"
            )


def test_imports_run_in_no_circle():
    """Files can be put in an order in which each imports only from those before it."""
    left = {name: {target for target in targets if target} for name, targets in IMPORTS.items() if name}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("folder", KNOW_NOT)
def test_methods_know_no_model_and_models_no_method(folder):
    for name, targets in IMPORTS.items():
        tops = {target.split(".")[0] for target in targets}
        assert not (name.split(".")[0] == folder and not name.endswith("__main__") and tops & KNOW_NOT[folder]), name


def test_package_runs_without_torch():
    for name, path in MODULES_OF.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {n for n in names if n.split(".")[0] == "torch"}, name


def test_no_file_is_more_than_one_idea():
    for name, path in MODULES_OF.items():
        assert len(path.read_text().splitlines()) <= 350, name
