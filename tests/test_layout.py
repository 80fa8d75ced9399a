"""Imports run in no circle, methods never name a model, models never name a method."""

import ast
from pathlib import Path

import mlxquant

ROOT = Path(mlxquant.__file__).parent


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports(name, path):
    """Modules of the package that a file imports, as dotted names inside it."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_imports_run_in_no_circle():
    """Files can be put in an order in which each imports only from those before it; imports inside of functions count."""
    names = {name for name, _ in modules()}
    known = {name: {i for i in set(imports(name, path)) if i in names and i != name} for name, path in modules()}
    while free := [name for name, needs in known.items() if not needs & known.keys()]:
        for name in free:
            del known[name]
    assert not known, f"circles among {sorted(known)}"


def test_methods_know_no_model_and_models_no_method():
    for name, path in modules():
        for imported in imports(name, path):
            pair = (name.split(".")[0], imported.split(".")[0])
            assert pair not in {("methods", "models"), ("models", "methods")}, f"{name} imports {imported}"


def test_package_runs_without_torch():
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {n for n in names if n.split(".")[0] == "torch"}, name


def test_no_file_is_more_than_one_idea():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 350, name
