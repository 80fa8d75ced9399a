"""Any language model that mlx-lm runs, from a folder or the hub, through the extra ``mlx-lm``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError, ArtifactError
from .language import LanguageAdapter, Tokenizer, Tokens


def mlx_lm_utils() -> Any:
    """mlx-lm's loading code; raises AdapterError, saying how to get it, where it is not installed."""
    try:
        return import_module("mlx_lm.utils")
    except ImportError as error:
        raise AdapterError("language models run in mlx-lm: install it with pip install 'mlxquant[mlx-lm]'") from error


class HubTokenizer:
    """mlx-lm's tokenizer, without the tokens that start or end a text."""

    def __init__(self, wrapped: Any):
        self.wrapped = wrapped

    def encode(self, text: str) -> Tokens:
        return np.array(self.wrapped.encode(text, add_special_tokens=False), np.int32)

    def decode(self, ids: Any) -> str:
        return str(self.wrapped.decode([int(token) for token in ids]))


class MLXLanguageModel(LanguageAdapter):
    """A model of mlx-lm's, with ``config``, what its config.json says."""

    name = "mlx-lm"

    def __init__(self, module: nn.Module, config: dict[str, Any]):
        super().__init__(module)
        self.config = config
        self._tokenizer: HubTokenizer | None = None
        longest = config.get("max_position_embeddings") or config.get("n_positions") or self.context
        self.context = min(self.context, int(longest))
        self.longest = config.get("n_positions")  # of a table that was learned; other positions are computed

    @classmethod
    def pretrained(cls, place: str = "") -> MLXLanguageModel:
        """From a folder or a hub id; raises ArtifactError when it is damaged, already quantized, or of a kind that
        mlx-lm does not know.
        """
        utils = mlx_lm_utils()
        if not place:
            raise AdapterError(
                "mlx-lm is no model but runs many: pass a folder with config.json and model.safetensors, or a hub id"
            )
        try:
            module, tokenizer, config = utils.load(place, lazy=True, return_config=True)
        except Exception as error:  # of the hub, of transformers, of mlx-lm: no base in common
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ArtifactError(
                f"{place}: mlx-lm cannot load it ({said}); check the folder or the hub id, or name mmdit-shapes,"
                " sd3-medium or gpt-python"
            ) from error
        if config.get("quantization"):
            raise ArtifactError(
                f"{place}: is quantized already ({config['quantization'].get('bits')} bits); pass the full-precision"
                " model"
            )
        adapter = cls(module, config)
        adapter.place, adapter._tokenizer = (
            str(Path(place).absolute()) if Path(place).is_dir() else place,
            HubTokenizer(tokenizer),
        )
        return adapter

    @classmethod
    def blank(cls, description: dict[str, Any]) -> MLXLanguageModel:
        model, arguments = mlx_lm_utils()._get_classes(description["config"])
        module = model(arguments.from_dict(description["config"]))
        module.set_dtype(getattr(mx, description["dtype"]))
        return cls(module, description["config"])

    def describe(self) -> dict[str, Any]:
        tied = (
            self.config.get("tie_word_embeddings", True) and "lm_head" not in self.module
        )  # SpinQuant unties what it rotates
        config = self.config if tied else {**self.config, "tie_word_embeddings": False}
        return {"config": config, "dtype": self.dtype}

    def twin(self) -> MLXLanguageModel:
        other = super().twin()
        other.place, other._tokenizer = self.place, self._tokenizer
        return other

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = HubTokenizer(mlx_lm_utils().load_tokenizer(Path(self.place)))
        return self._tokenizer

    def save_beside(self, folder: Path) -> str:
        """The tokenizer's files go into the folder, too."""
        tokenizer = self.tokenizer
        assert isinstance(tokenizer, HubTokenizer)
        tokenizer.wrapped.save_pretrained(str(folder))
        return "."
