"""Runs examples/spinquant_sample.py, which once was here: commands with the old path keep working."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "spinquant_sample.py"), run_name="__main__")
