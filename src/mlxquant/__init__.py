"""mlxquant: make diffusion transformers small enough for the Mac they run on, without the picture changing.

import mlxquant as mq

model = mq.load("mmdit-shapes")
calib = mq.calibrate(model, prompts=16, steps=28, seed=0)
qmodel = mq.quantize(model, calib, "gptq-w4a8")
mq.compare(model, qmodel, "a large red circle at left on white background", seed=7).save("circle.png")
qmodel.save("out")

Names are imported when they are first used, so that ``import mlxquant`` and the command line's help cost little.
"""

from __future__ import annotations

from . import _interrupt  # noqa: F401  # before all that takes time

# isort: split
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._blas import keep_freed_memory, prefer_fast_blas

prefer_fast_blas()  # before anything imports mlx.core
keep_freed_memory()

if TYPE_CHECKING:
    from .api.loading import load
    from .api.model import Model, QuantizedModel
    from .api.pipeline_files import load_pipeline, save_pipeline
    from .api.pipelines import quantize_pipeline
    from .api.quantizing import calibrate, calibrate_text, compare, quantize
    from .api.recorded import quantize_module
    from .errors import MlxQuantError
    from .exporters.targets import export
    from .layers.convolutions import QuantizedConv1d, QuantizedConv2d
    from .layers.embeddings import QuantizedEmbedding
    from .layers.fake_quant_linear import FakeQuantLinear
    from .layers.linear import QuantizedLinear
    from .layers.module_files import load_module, save_module
    from .layers.quantize_linears import quantize_linears
    from .layers.quantizer import Quantizer
    from .layers.weight_only import W8A16Linear, W8A16LinearLayer
    from .models.catalog import register_model
    from .models.gpt.network import GPT
    from .models.recorded.recording import recording
    from .recipes.citations import citation
    from .recipes.grammar import parse_recipe
    from .recipes.recipe import Recipe
    from .sampling.prompts import Prompt, read_prompts
    from .spin_quant.learning import SpinQuant

HOMES = {  # what users import from here, and where it stands
    "FakeQuantLinear": "layers.fake_quant_linear",
    "GPT": "models.gpt.network",
    "MlxQuantError": "errors",
    "Model": "api.model",
    "Prompt": "sampling.prompts",
    "QuantizedConv1d": "layers.convolutions",
    "QuantizedConv2d": "layers.convolutions",
    "QuantizedEmbedding": "layers.embeddings",
    "QuantizedLinear": "layers.linear",
    "QuantizedModel": "api.model",
    "Quantizer": "layers.quantizer",
    "Recipe": "recipes.recipe",
    "SpinQuant": "spin_quant.learning",
    "W8A16Linear": "layers.weight_only",
    "W8A16LinearLayer": "layers.weight_only",
    "calibrate": "api.quantizing",
    "calibrate_text": "api.quantizing",
    "citation": "recipes.citations",
    "compare": "api.quantizing",
    "export": "exporters.targets",
    "load": "api.loading",
    "load_module": "layers.module_files",
    "load_pipeline": "api.pipeline_files",
    "parse_recipe": "recipes.grammar",
    "quantize": "api.quantizing",
    "quantize_linears": "layers.quantize_linears",
    "quantize_module": "api.recorded",
    "quantize_pipeline": "api.pipelines",
    "read_prompts": "sampling.prompts",
    "recording": "models.recorded.recording",
    "register_model": "models.catalog",
    "save_module": "layers.module_files",
    "save_pipeline": "api.pipeline_files",
}
__all__ = [
    "GPT",
    "FakeQuantLinear",
    "MlxQuantError",
    "Model",
    "Prompt",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModel",
    "Quantizer",
    "Recipe",
    "SpinQuant",
    "W8A16Linear",
    "W8A16LinearLayer",
    "calibrate",
    "calibrate_text",
    "citation",
    "compare",
    "export",
    "load",
    "load_module",
    "load_pipeline",
    "parse_recipe",
    "quantize",
    "quantize_linears",
    "quantize_module",
    "quantize_pipeline",
    "read_prompts",
    "recording",
    "register_model",
    "save_module",
    "save_pipeline",
]


class _Package(ModuleType):
    """Python sets a submodule on its package when it is imported; one that is called like a name of ``HOMES`` must not
    hide that: ``mq.quantize`` is the function, ``mlxquant.quantize`` the command's module.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
