"""Small pipelines of mflux, quantized by us once for all tests that look at them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from mlxquant.api.pipelines import PipelineReport, quantize_pipeline
from mlxquant.exporters.pipelines import write_pipeline
from mlxquant.models.mflux.pipeline import MfluxPipeline
from mlxquant.sampling.prompts import Prompt

from support.mflux_checkpoints import saved, small_models

CALIBRATION = (Prompt(1, "a red circle"), Prompt(2, "a blue square"))
DRAWN = (Prompt(3, "a green triangle"),)
SIZE = (64, 64)


@dataclass(frozen=True)
class Done:
    """A pipeline before and after, the folder that it came from and the one that was written."""

    dense: Path
    out: Path
    pipeline: MfluxPipeline
    report: PipelineReport
    facts: dict
    before: np.ndarray
    after: np.ndarray


def dense(name, folder=None):
    """The folder of a small pipeline in full precision, as 'mflux-save' writes it."""
    folder = Path(mkdtemp(prefix="mflux-small-")) if folder is None else folder
    with small_models():
        saved(name, folder)
    return folder


def drawn(pipeline):
    """What it draws of a prompt that calibration has not seen."""
    with small_models():
        return pipeline.draw(DRAWN, 2, size=SIZE)


@cache
def quantized(name, recipe="gptq-w4a16-g64", **recipes):
    """A small pipeline, quantized by a recipe and written for mflux."""
    folder = dense(name)
    with small_models():
        pipeline = MfluxPipeline.load(str(folder))
        before = drawn(pipeline)
        report = quantize_pipeline(pipeline, CALIBRATION, recipe, **recipes, steps=2, size=SIZE)
        after = drawn(pipeline)
        out = folder.with_name(f"{folder.name}-out")
        facts = write_pipeline(pipeline, out, {"calibration": {"prompts": 2}, **report.facts})
    return Done(folder, out, pipeline, report, facts, before, after)
