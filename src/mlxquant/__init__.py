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

from .api.model import Model, QuantizedModel, load
from .api.quantizing import calibrate, calibrate_text, compare, quantize
from .errors import MlxQuantError  # noqa: E402
from .exporters.targets import export  # noqa: E402
from .layers.convolutions import (
    QuantizedConv1d,  # noqa: E402
    QuantizedConv2d,  # noqa: E402
)
from .layers.embeddings import QuantizedEmbedding  # noqa: E402
from .layers.fake_quant_linear import FakeQuantLinear  # noqa: E402
from .layers.linear import QuantizedLinear  # noqa: E402
from .layers.module_files import (
    load_module,  # noqa: E402
    save_module,  # noqa: E402
)
from .layers.quantize_linears import quantize_linears  # noqa: E402
from .layers.weight_only import W8A16Linear  # noqa: E402
from .recipes.citations import citation  # noqa: E402
from .recipes.presets import parse_recipe  # noqa: E402
from .recipes.recipe import Recipe  # noqa: E402
from .sampling.prompts import (
    Prompt,  # noqa: E402
    read_prompts,  # noqa: E402
)
from .spin_quant.learning import SpinQuant  # noqa: E402

__all__ = [
    "FakeQuantLinear",
    "MlxQuantError",
    "Model",
    "Prompt",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModel",
    "Recipe",
    "SpinQuant",
    "W8A16Linear",
    "calibrate",
    "calibrate_text",
    "citation",
    "compare",
    "export",
    "load",
    "load_module",
    "parse_recipe",
    "quantize",
    "quantize_linears",
    "read_prompts",
    "save_module",
]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """``mq.quantize`` is the function; importing the command's module of the same name must not hide it."""
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
