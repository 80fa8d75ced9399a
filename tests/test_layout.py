"""Imports run one way, methods never name a model, models never name a method."""

import ast
from pathlib import Path

import mlxquant

ROOT = Path(mlxquant.__file__).parent
ORDER = [
    ["_blas", "array_memory", "errors", "progress", "tensor_layout"],
    ["artifacts", "formats", "hub", "layer_patterns", "schedule"],
    ["activations", "corpus", "metrics", "prompts", "rewrite", "sampler", "methods.registry", "methods.moments", "methods.adaround"],
    ["integer_matmul", "turned_norm", "packed_arrays", "methods.hadamard", "methods.lowrank"],
    ["layers", "measurements", "report", "run_order", "statistics"],
    ["affine", "model_size", "transform"],
    ["methods"],
    ["recipe"],
    ["presets"],
    ["weight_only"],
    ["convolutions", "embeddings"],
    ["size_report"],
    ["module_files"],
    ["quantize_linears"],
    ["fake_quant_linear", "models.adapter"],
    ["models"],
    ["folds", "rotations", "streams", "store", "text_sampler"],
    ["calibration", "prediction", "probabilities", "reconstruction", "sensitivity", "spin_network", "text_calibration"],
    ["input_tables"],
    ["divisions", "layer_rounding", "transforming"],
    ["spin_files", "spin_quant", "trials"],
    ["sweep"],
    ["allocation", "citations"],
    ["pipeline"],
    ["decisions"],
    ["qat"],
    ["models.gpt_python"],
    ["contents"],
    ["api"],
    ["console", "exporters", "jobs", "gpt_training"],
    ["evaluation"],
    [
        "adaround_optimize",
        "analyze_activations",
        "models.train_shapes",
        "compare_images",
        "demo",
        "evaluate",
        "export",
        "generate",
        "inspect",
        "visualize",
        "list_methods",
        "perplexity",
        "quantize",
        "save_weights",
        "train_gpt",
        "cache_adaround_data",
        "collect_layer_activations",
        "generate_calibration_data",
        "load_adaround_model",
    ],
    ["recipe_command", "benchmark_final"],
    ["calibrate_snr", "quantize_qronos"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def rank(module):
    """The rank of the longest known prefix of a dotted name inside the package."""
    parts = module.split(".")
    return next(RANK[".".join(parts[:n])] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in RANK)


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
            yield from [".".join(base)] if node.module else [".".join([*base, alias.name]) for alias in node.names]


def test_imports_run_one_way():
    for name, path in modules():
        for imported in imports(name, path):
            inside = name.split(".")[0] == imported.split(".")[0]
            assert rank(imported) < rank(name) or inside, f"{name} imports {imported}"


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
