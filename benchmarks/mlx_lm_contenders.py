"""mlx-lm's own ways to quantize, by its own functions: plain rounding, ``gptq``, ``awq``, ``dynamic_quant``, ``dwq``.

A contender is ``METHOD-wBITS-gGROUP``, on equal terms with a recipe of ours: the calibration text is ours, and
embeddings stay in full precision. ``METHOD`` alone is what its command line does where nothing is asked: its bits and
groups, embeddings quantized, as many tokens as it takes; its text comes from the network, so that is ours still.
``@N`` is another number of windows, ``*RATE`` another learning rate of ``dwq``.

Everything is computed in float32: float16 is slow on CPUs, and ``dwq``'s bfloat16 loses digits of its scales. For
``dwq`` the codes are unpacked once, since products with packed weights are slow there, too; codes, gradients and steps
are its own. Whatever has been quantized is then cast to the model's dtype, which is what mlx-lm stores.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import compute_bits_per_weight, quantize_model

from mlxquant.errors import RecipeError
from mlxquant.layers.tree import set_module

NAME = re.compile(r"(\w+?)(?:\*([\d.]+(?:e-?\d+)?))?(?:-w(\d)-g(\d+))?(?:@(\d+))?")
STORED = mx.float16  # what the models here are in, and what scales are stored in
VALIDATION = 32  # windows that dwq looks at as it learns, its own number
SEED = 123  # that of mlx-lm's commands


@dataclass(frozen=True)
class Text:
    """Windows int32 [n,length] to calibrate on, and ``VALIDATION`` others."""

    windows: mx.array
    validation: mx.array


@dataclass(frozen=True)
class Contender:
    """A method with what it is asked for.

    Attributes:
        method: One of ``METHODS``.
        bits: Of linear layers; of ``dynamic_quant`` on average.
        group: Weights that share a scale.
        whole: Embeddings are quantized as well, as the method's command does; else they stay.
        windows: Of calibration text.
        rate: The learning rate of ``dwq``.
        target: Bits a weight of the whole model, for ``dynamic_quant`` alone; None for those of plain rounding.
    """

    method: str
    bits: int = 4
    group: int = 64
    whole: bool = False
    windows: int = 64
    rate: float = 1e-6
    target: float | None = None

    @classmethod
    def parse(cls, name: str, samples: int) -> Contender:
        """A contender by its name, on ``samples`` windows unless it says more; RecipeError where none is called
        so.
        """
        match = NAME.fullmatch(name)
        if match is None or match[1] not in METHODS:
            raise RecipeError(f"{name!r} is none of mlx-lm's; expected METHOD-wBITS-gGROUP, METHOD of {METHODS}")
        method, rate, bits, group, windows = match.groups()
        asked: dict[str, Any] = (
            {"windows": samples, "bits": int(bits), "group": int(group)} if bits else DEFAULTS[method]
        )
        return cls(
            method, **asked | ({"rate": float(rate)} if rate else {}) | ({"windows": int(windows)} if windows else {})
        )

    def quantize(self, model: nn.Module, config: dict[str, Any], text: Text) -> nn.Module:
        """A float32 model, quantized and stored; it may be changed in place. RecipeError where mlx-lm cannot."""
        mx.random.seed(SEED)
        if not self.whole:
            hide_embeddings(model)
        model = METHODS[self.method](self, model, config, text)
        model.set_dtype(STORED)
        mx.eval(model.parameters())
        return model


class Exact(nn.Embedding):
    """An embedding that mlx-lm passes over: it has no ``to_quantized``."""

    def __init__(self, other: nn.Embedding):
        super().__init__(1, 1)
        self.weight = other.weight
        self.freeze()

    @property
    def to_quantized(self) -> Any:
        raise AttributeError("an embedding that stays in full precision")


class Itself(Exact):
    """One whose quantized form is itself, for ``awq``, which asks without looking."""

    def to_quantized(self, **_: Any) -> nn.Module:  # type: ignore[override]
        return self


def hide_embeddings(model: nn.Module, kind: type[Exact] = Exact) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            set_module(model, path, kind(module))


def rounded(contender: Contender, model: nn.Module, config: dict[str, Any], text: Text | None = None) -> nn.Module:
    """What ``mlx_lm.convert -q`` does."""
    return quantize_model(model, config, contender.group, contender.bits)[0]


def gptq(contender: Contender, model: nn.Module, config: dict[str, Any], text: Text) -> nn.Module:
    if contender.bits not in (2, 4, 8):
        raise RecipeError(f"mlx-lm's gptq packs 2, 4 or 8 bits, not {contender.bits}")
    fallback = 6, 64  # of its command, for what is no linear layer
    return gptq_quantize(model, text.windows, contender.bits, contender.group, *fallback)[0]


def awq(contender: Contender, model: nn.Module, config: dict[str, Any], text: Text) -> nn.Module:
    if config["model_type"] not in AWQ_MODEL_CONFIGS:
        raise RecipeError(f"mlx-lm's awq has no configuration for {config['model_type']}")
    if not contender.whole:
        hide_embeddings(model, Itself)
    known = AWQ_MODEL_CONFIGS[config["model_type"]]
    like = () if contender.whole else (contender.group, contender.bits)  # an output layer that is no embedding
    awq_quantize(model, text.windows, known, contender.group, contender.bits, *like)
    return model


def dynamic_quant(contender: Contender, model: nn.Module, config: dict[str, Any], text: Text) -> nn.Module:
    """Layers get a bit more or less than asked; by default, where the target says more than 4 bits, 4 or 5."""
    low, high = (contender.bits, 5) if contender.target else (contender.bits - 1, contender.bits + 1)
    if low < 2:
        raise RecipeError("MLX has no 1 bit, so mlx-lm's dynamic_quant cannot go to either side of 2")
    layouts = low, contender.group, high, contender.group
    target = contender.target
    if target is None:
        target = compute_bits_per_weight(rounded(contender, stored(model), config))
    sensitivities = dict(estimate_sensitivities(model, text.windows, *layouts))
    threshold = estimate_threshold(stored(model), sensitivities, target, *layouts)

    def bits_of(path: str, layer: nn.Module) -> bool | dict[str, int]:
        return {"bits": high, "group_size": contender.group} if sensitivities[path] > threshold else True

    return quantize_model(model, config, contender.group, low, quant_predicate=bits_of)[0]


def dwq(contender: Contender, model: nn.Module, config: dict[str, Any], text: Text) -> nn.Module:
    """Scales and biases learn the logits of the model in full precision, one pass over the text."""
    student = rounded(contender, copy.deepcopy(model), config)
    replace(student, nn.QuantizedLinear, Unpacked)
    train, validation = ([(window, 0) for window in part.tolist()] for part in (text.windows, text.validation))
    optimizer = optim.Adam(learning_rate=contender.rate, bias_correction=True)
    teacher = partial(lambda batch, number, split: model(batch))
    dwq_quantize(student, teacher, optimizer, train, validation, 4, 1025, SEED, dtype=mx.float32)
    replace(student, Unpacked, Unpacked.packed)
    return student.eval()


class Unpacked(nn.Module):
    """A quantized linear layer whose codes are kept as numbers; ``dwq`` knows it by its attributes."""

    def __init__(self, layer: nn.QuantizedLinear):
        super().__init__()
        self.bits, self.group_size, self.mode = layer.bits, layer.group_size, layer.mode
        self.weight, self.scales, self.biases = layer.weight, layer.scales, layer.biases
        if "bias" in layer:
            self.bias = layer.bias
        plain = mx.ones_like(layer.scales), mx.zeros_like(layer.biases)
        codes = mx.dequantize(layer.weight, *plain, layer.group_size, layer.bits)
        self.codes = codes.reshape(*layer.scales.shape, layer.group_size)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        weight = (self.codes * self.scales[..., None] + self.biases[..., None]).flatten(1)
        return x @ weight.T + self.bias if "bias" in self else x @ weight.T

    def packed(self) -> nn.QuantizedLinear:
        inputs = self.codes[0].size
        layer = nn.QuantizedLinear(inputs, len(self.codes), "bias" in self, self.group_size, self.bits)
        for name in ("weight", "scales", "biases", "bias"):
            if name in self:
                layer[name] = self[name]
        return layer


def replace(model: nn.Module, old: type[nn.Module], new: Callable[[Any], nn.Module]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, old):
            set_module(model, path, new(module))


def stored(model: nn.Module) -> nn.Module:
    """A copy as it is stored: mlx-lm counts the bits of that."""
    other = copy.deepcopy(model)
    other.set_dtype(STORED)
    return other


METHODS: dict[str, Callable[[Contender, nn.Module, dict[str, Any], Text], nn.Module]] = {
    "rtn": rounded,
    "gptq": gptq,
    "awq": awq,
    "dynamic_quant": dynamic_quant,
    "dwq": dwq,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # of its commands; 128 samples of 512 tokens are 256 windows
    "rtn": {"whole": True},
    "gptq": {"whole": True, "windows": 256},
    "awq": {"whole": True, "windows": 256},
    "dynamic_quant": {"whole": True, "windows": 256, "target": 5.0},
    "dwq": {"whole": True, "windows": 2048},
}
