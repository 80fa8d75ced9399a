"""The order of imports, as the test of the layout holds it and docs/architecture.md tells it."""

GROUND = ["_blas", "_interrupt", "errors", "progress"]  # what any folder may import
FOLDERS = [  # a folder imports only from those before it
    "files", "numerics", "sampling", "commandline", "grids", "methods", "recipes", "layers", "models", "calibration",
    "metrics", "qat", "curvature",
    "sweep", "tuning", "report", "pipeline", "spin_quant", "api", "contents", "evaluation", "exporters",
]  # fmt: skip
