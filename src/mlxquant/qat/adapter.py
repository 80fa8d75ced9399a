"""GPTs as ``train-gpt`` leaves them, which may have been trained through rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from ..errors import AdapterError
from ..models.gpt.adapter import EMBEDDED, GPTAdapter, embedded
from .folders import QUANTIZATION, quantized_gpt
from .integer import to_integer_layers
from .options import QuantizationOptions


class TrainedGPT(GPTAdapter):
    """A GPT that runs as it was trained: one that was trained through rounding has integer layers and rounded
    activations, and is not quantized again.
    """

    @classmethod
    def pretrained(cls, place: str = "") -> TrainedGPT:
        if place in ("", EMBEDDED):
            return cls(*embedded())
        module, tokenizer, facts = quantized_gpt(Path(place))
        return cls(to_integer_layers(module), tokenizer, facts)

    def twin(self) -> Self:
        if QuantizationOptions(self.facts.get(QUANTIZATION, {})).anything:
            raise AdapterError(
                "this GPT was trained through rounding and is quantized already; quantize one that was trained without"
            )
        return super().twin()
