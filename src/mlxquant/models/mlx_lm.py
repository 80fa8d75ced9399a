"""Any language model that mlx-lm runs, from a folder or the hub, through the extra ``mlx-lm``.

A model is data: nothing that lies beside the weights is run. mlx-lm before 0.32 imports the file that a config.json
calls ``model_file``, and transformers asks on the terminal before it imports a tokenizer's own. So only data is
downloaded, and a folder that asks for code is refused before mlx-lm sees it.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError, ArtifactError, reason
from ..files import schema
from ..files.hub import hub_folder, read_description
from ..layers.convolutions import QuantizedConvolution
from ..layers.kinds import find_exact_layers, known_kind
from .language import LanguageAdapter, Tokenizer, Tokens


def mlx_lm_utils() -> Any:
    """mlx-lm's loading code; raises AdapterError, saying how to get it, where it is not installed."""
    try:
        return import_module("mlx_lm.utils")
    except ImportError as error:
        raise AdapterError("language models run in mlx-lm: install it with pip install 'mlxquant[mlx-lm]'") from error


DATA = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")  # and no *.py
NO_CODE = {"trust_remote_code": False}  # transformers asks on the terminal where it is not told
INSTEAD = "pass a local folder with --model"


def _sizes(value: Any, where: str) -> None:
    """The schema of whatever a config says: whole numbers are int32, and few where they count layers."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _sizes(inner, f"{where}.{name}")
    elif isinstance(value, int) and not isinstance(value, bool):
        counts = re.search(r"layers?(\.\d+)?$", where) is not None
        schema.whole(-schema.INT32 - 1, schema.DEPTH if counts else schema.INT32)(value, where)


CONFIG = schema.every(schema.entries({"model_type": schema.text}), _sizes)


def data_of(place: str) -> Path:
    """The folder of a model that is a folder or a hub id. Raises ArtifactError where that cannot be had, and where its
    configs name Python code to be imported for the model or for its tokenizer.
    """
    folder = Path(place) if Path(place).is_dir() else hub_folder(place, DATA, "mlx-lm", INSTEAD)
    for name, key in (("config.json", "model_file"), ("tokenizer_config.json", "auto_map")):
        path = folder / name
        said = read_description(path) if path.is_file() else {}
        if (code := said.get(key)) is not None:
            raise ArtifactError(
                f"{path}: {key} asks to run Python code that comes with the model ({code!r:.80}), and mlxquant runs"
                " none; choose a model that mlx-lm knows by its model_type, with a tokenizer that transformers has"
            )
    return folder


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
    STRUCTURE = schema.entries({"config": CONFIG, "dtype": schema.floating})

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
        folder = data_of(place)
        try:
            module, tokenizer, config = utils.load(str(folder), tokenizer_config=NO_CODE, lazy=True, return_config=True)
        except Exception as error:  # of transformers, of mlx-lm: no base in common
            raise ArtifactError(
                f"{place}: mlx-lm cannot load it ({reason(error)}); check the folder or the hub id, or name"
                " mmdit-shapes, sd3-medium or gpt-python"
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
        utils = mlx_lm_utils()
        try:
            model, arguments = utils._get_classes(description["config"])
            module = model(arguments.from_dict(description["config"]))
            module.set_dtype(getattr(mx, description["dtype"]))
            return cls(module, description["config"])
        except Exception as error:  # of mlx-lm's models: no base in common
            raise ArtifactError(
                f"mlx-lm cannot build a model of this config ({reason(error)}); quantize again"
            ) from error

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

    def left_out(self) -> dict[str, str]:
        """Convolutions: mlx-lm has no quantized form of them, and a state-space model's have a few taps a channel."""
        found = find_exact_layers(self.module).items()
        return {
            path: "mlx-lm has no quantized convolution"
            for path, layer in found
            if issubclass(known_kind(layer).form, QuantizedConvolution)
        }

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            found = mlx_lm_utils().load_tokenizer(data_of(self.place), tokenizer_config_extra=NO_CODE)
            self._tokenizer = HubTokenizer(found)
        return self._tokenizer

    def save_beside(self, folder: Path) -> str:
        """The tokenizer's files go into the folder, too."""
        tokenizer = self.tokenizer
        assert isinstance(tokenizer, HubTokenizer)
        tokenizer.wrapped.save_pretrained(str(folder))
        return "."
