"""GPTs of our own: ``gpt-python``, which is embedded and was trained on Python's standard library, and what ``train_gpt`` writes."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import AdapterError
from ...layers.tree import set_module
from ...layers.turned_norm import TurnedNorm
from ...qat.folders import QUANTIZATION, quantized_gpt
from ...qat.integer import to_integer_layers
from ...qat.options import QuantizationOptions
from ..language import LanguageAdapter
from .files import load_gpt
from .network import GPT, GPTConfig
from .tokenizers import ByteTokenizer, CharTokenizer, tokenizer_from_facts

EMBEDDED = "gpt-python"


class GPTAdapter(LanguageAdapter):
    """A GPT with its tokenizer and what is known of how it was made.

    One that was trained through rounding runs as it was trained, on integer layers and rounded activations; it is not quantized again.
    """

    name = "gpt"

    def __init__(self, module: GPT, tokenizer: ByteTokenizer | CharTokenizer, facts: dict[str, Any]):
        super().__init__(module)
        self._tokenizer, self.config, self.facts, self.context = tokenizer, module.config, facts, module.config.n_positions
        self.longest = module.config.n_positions

    @classmethod
    def pretrained(cls, place: str = EMBEDDED) -> GPTAdapter:
        """The embedded weights, or those of a folder; raises ArtifactError when they are damaged."""
        if place == EMBEDDED:
            with as_file(files("mlxquant.assets") / EMBEDDED) as folder:
                return cls(*load_gpt(folder))
        module, tokenizer, facts = quantized_gpt(Path(place))
        return cls(to_integer_layers(module), tokenizer, facts)

    @classmethod
    def blank(cls, description: dict[str, Any]) -> GPTAdapter:
        tokenizer = tokenizer_from_facts(description["tokenizer"])
        module = GPT(GPTConfig.from_dict(description["config"]))
        if description["turned"]:
            set_module(module, "model.ln_f", TurnedNorm(module.model.ln_f, mx.zeros((module.config.n_embd,) * 2)))
        module.set_dtype(getattr(mx, description["dtype"]))
        return cls(module, tokenizer, description["facts"])

    def twin(self) -> GPTAdapter:
        if QuantizationOptions(self.facts.get(QUANTIZATION, {})).anything:
            raise AdapterError("this GPT was trained through rounding and is quantized already; quantize one that was trained without")
        return super().twin()

    @property
    def tokenizer(self) -> ByteTokenizer | CharTokenizer:
        return self._tokenizer

    def describe(self) -> dict[str, Any]:
        turned = isinstance(self.module.model.ln_f, TurnedNorm)  # as SpinQuant leaves it
        made = {"config": self.config.to_dict(), "tokenizer": self._tokenizer.facts, "facts": self.facts}
        return {**made, "dtype": self.dtype, "turned": turned}
