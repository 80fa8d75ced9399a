"""A GPT that SpinQuant rotated, as a model of the toolkit: it predicts and writes text, and is not quantized again."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from ..errors import AdapterError
from ..models.gpt.adapter import GPTAdapter
from .files import load_spun


class SpunGPT(GPTAdapter):
    """A GPT from a file that ``save_spun`` wrote."""

    @classmethod
    def of(cls, place: Path) -> SpunGPT:
        """The model in a folder or a file; raises ArtifactError as ``load_spun`` does."""
        return cls(*load_spun(place))

    def twin(self) -> NoReturn:
        raise AdapterError(
            "this GPT was rotated by SpinQuant already; quantize the full-precision one that it was made from"
        )
