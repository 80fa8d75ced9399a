"""Text as the small GPTs read it: one token a byte of UTF-8, or one a character of a known alphabet.

``files`` describes either to transformers, so that the same ids come out of its fast tokenizers and a folder loads in
mlx-lm. A character outside of the alphabet is an error here; transformers drops it, because mlx-lm tries every
tokenizer on a text of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import AdapterError, ArtifactError, reason
from ...files import schema
from ..language import Tokens

BYTES = 256


class ByteTokenizer:
    """256 tokens, the bytes of UTF-8: every text has one encoding. Bytes that are no text decode to U+FFFD."""

    level: ClassVar[str] = "byte"
    vocab_size = BYTES

    @property
    def facts(self) -> dict[str, Any]:
        return {"level": self.level}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> ByteTokenizer:
        return cls()

    def encode(self, text: str) -> Tokens:
        """Tokens int32 [bytes]."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")

    def files(self) -> dict[str, str]:
        """GPT-2's byte-level BPE without a merge: each byte is written as its printable letter and stays alone."""
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return _files(byte_letters(), split, split)


class CharTokenizer:
    """One token a character; ``characters`` is the alphabet, in the order of its code points."""

    level: ClassVar[str] = "char"

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise AdapterError("a character tokenizer of no characters; expected a text with at least one")
        self._points = _code_points(self.characters)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def facts(self) -> dict[str, Any]:
        return {"level": self.level, "characters": self.characters}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> CharTokenizer:
        return cls(facts["characters"])

    def encode(self, text: str) -> Tokens:
        """Tokens int32 [characters]; raises AdapterError on a character that the alphabet lacks."""
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        if (unknown := self._points[ids] != points).any():
            place = int(unknown.argmax())
            raise AdapterError(
                f"character {text[place]!r} at place {place} is not among the {self.vocab_size} that the model knows; "
                "remove it, or train with --level byte, which knows all"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def files(self) -> dict[str, str]:
        """A BPE without a merge: each character stays alone."""
        return _files(self.characters, None, {"type": "Fuse"})


TOKENIZERS: dict[str, type[ByteTokenizer] | type[CharTokenizer]] = {
    kind.level: kind for kind in (ByteTokenizer, CharTokenizer)
}


FACTS = schema.entries({"level": schema.one_of(*TOKENIZERS)}, {"characters": schema.text})


def tokenizer_from_facts(facts: Mapping[str, Any]) -> ByteTokenizer | CharTokenizer:
    """Raises ArtifactError on facts that describe no tokenizer of ours."""
    try:
        FACTS(facts, "")
        return TOKENIZERS[facts["level"]].from_facts(facts)
    except (KeyError, schema.MismatchError) as error:
        raise ArtifactError(
            f"a tokenizer's facts need a level, one of {list(TOKENIZERS)}, and its alphabet; {reason(error)}"
        ) from error


def tokenizer_for(level: str, text: str) -> ByteTokenizer | CharTokenizer:
    """A tokenizer of this level that knows every character of ``text``."""
    return tokenizer_from_facts({"level": level, "characters": text})


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it can be seen, the others in order from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in seen else chr(next(spare)) for byte in range(BYTES)]


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _files(letters: Iterable[str], split: dict[str, Any] | None, decoder: dict[str, Any]) -> dict[str, str]:
    """What transformers reads of a BPE with these letters and no merge: contents by file name."""
    vocabulary = {letter: token for token, letter in enumerate(letters)}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "vocab": vocabulary,
        "merges": [],
    }
    described: dict[str, Any] = {
        "version": "1.0",
        **nothing,
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": decoder,
        "model": model,
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    contents = {"tokenizer.json": described, "tokenizer_config.json": settings}
    return {name: json.dumps(data, indent=1, ensure_ascii=False) + "\n" for name, data in contents.items()}
