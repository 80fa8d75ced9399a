"""GPTs of our own: ``gpt-python``, which is embedded and was trained on Python's standard library, and others in
folders like its.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...files import schema
from ...layers.tree import set_module
from ..language import LanguageAdapter
from ..turned_norm import TurnedNorm
from .files import load_gpt
from .network import CONFIG, GPT, GPTConfig
from .tokenizers import FACTS, ByteTokenizer, CharTokenizer, tokenizer_from_facts

EMBEDDED = "gpt-python"


def embedded() -> tuple[GPT, ByteTokenizer | CharTokenizer, dict[str, Any]]:
    """The model that ships with the package, its tokenizer, and what is known of how it was made."""
    with as_file(files("mlxquant.assets") / EMBEDDED) as folder:
        return load_gpt(folder)


class GPTAdapter(LanguageAdapter):
    """A GPT with its tokenizer and what is known of how it was made."""

    name = "gpt"
    STRUCTURE = schema.entries(
        {
            "config": CONFIG,
            "tokenizer": FACTS,
            "turned": schema.flag,
            "dtype": schema.floating,
            "facts": schema.table_of(schema.anything),
        }
    )

    def __init__(self, module: GPT, tokenizer: ByteTokenizer | CharTokenizer, facts: dict[str, Any]):
        super().__init__(module)
        self._tokenizer, self.config, self.facts, self.context = (
            tokenizer,
            module.config,
            facts,
            module.config.n_positions,
        )
        self.longest = module.config.n_positions

    @classmethod
    def pretrained(cls, place: str = "") -> GPTAdapter:
        """The embedded weights, which "" and their own name stand for, or those of a folder; raises ArtifactError when
        they are damaged.
        """
        return cls(*(embedded() if place in ("", EMBEDDED) else load_gpt(Path(place))))

    @classmethod
    def blank(cls, description: dict[str, Any]) -> GPTAdapter:
        tokenizer = tokenizer_from_facts(description["tokenizer"])
        module = GPT(GPTConfig.from_dict(description["config"]))
        if description["turned"]:
            set_module(module, "model.ln_f", TurnedNorm(module.model.ln_f, mx.zeros((module.config.n_embd,) * 2)))
        module.set_dtype(getattr(mx, description["dtype"]))
        return cls(module, tokenizer, description["facts"])

    @property
    def tokenizer(self) -> ByteTokenizer | CharTokenizer:
        return self._tokenizer

    def describe(self) -> dict[str, Any]:
        turned = isinstance(self.module.model.ln_f, TurnedNorm)  # as SpinQuant leaves it
        made = {"config": self.config.to_dict(), "tokenizer": self._tokenizer.facts, "facts": self.facts}
        return {**made, "dtype": self.dtype, "turned": turned}
