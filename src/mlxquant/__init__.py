"""mlxquant: make diffusion transformers small enough for the Mac they run on, without the picture changing.

import mlxquant as mq

model = mq.load("mmdit-shapes")
calib = mq.calibrate(model, prompts=16, steps=28, seed=0)
qmodel = mq.quantize(model, calib, "gptq-w4a8")
mq.compare(model, qmodel, "a large red circle at left on white background", seed=7).save("circle.png")
qmodel.save("out")
"""

from __future__ import annotations

import sys
from types import ModuleType

from ._blas import prefer_fast_blas

prefer_fast_blas()  # before anything imports mlx.core

from .api import Model, QuantizedModel, calibrate, compare, load, quantize  # noqa: E402
from .citations import citation  # noqa: E402
from .errors import MlxQuantError  # noqa: E402
from .fake_quant_linear import FakeQuantLinear  # noqa: E402
from .presets import parse_recipe  # noqa: E402
from .prompts import Prompt, read_prompts  # noqa: E402
from .recipe import Recipe  # noqa: E402

__all__ = [
    "FakeQuantLinear",
    "MlxQuantError",
    "Model",
    "Prompt",
    "QuantizedModel",
    "Recipe",
    "calibrate",
    "citation",
    "compare",
    "load",
    "parse_recipe",
    "quantize",
    "read_prompts",
]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """``mq.quantize`` is the function; importing the command's module of the same name must not hide it."""
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
