"""Prompts to token ids as transformers has them, by the packages tokenizers and sentencepiece alone.

CLIP's tokenizer is made of ``vocab.json`` and ``merges.txt``, T5's of ``spiece.model``, or either is read from a
``tokenizer.json``. What the folder says of special tokens decides: CLIP-L pads with the end token, CLIP-G with "!", and
a special token in the text of a prompt is that token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import AdapterError, ArtifactError, reason
from ...files import schema
from ...files.hub import read_description
from ..checkpoints.source import Source

EXTRA = "images"
CLIP_TOKENS = 77
VOCABULARY, MERGES, PIECES, FAST = "vocab.json", "merges.txt", "spiece.model", "tokenizer.json"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
CLIP_ROLES = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
EXTRA_IDS = 100  # T5's "<extra_id_0>" and on: behind all pieces, the first of them last

OPTIONS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), schema.flag)
ADDED = schema.entries({"content": schema.text}, OPTIONS)
NAMED = schema.entries({}, dict.fromkeys(ROLES, schema.maybe(schema.either(schema.text, ADDED))))
SETTING = schema.every(
    NAMED,
    schema.entries({}, {"added_tokens_decoder": schema.table_of(ADDED), "extra_ids": schema.whole(0, schema.WIDTH)}),
)


@dataclass(frozen=True)
class Special:
    """What a folder says of special tokens. A token is a text, or an object with the options of an added one.

    Attributes:
        named: Token by its role, such as "pad_token".
        added: Token by its id.
        extra_ids: How many sentinels a T5 has.
    """

    named: dict[str, Any]
    added: dict[int, dict[str, Any]]
    extra_ids: int

    @classmethod
    def read(cls, source: Source, component: str) -> Special:
        """As transformers does: what ``special_tokens_map.json`` says goes before ``tokenizer_config.json``, but not
        where that lists the added tokens.
        """
        settings = _described(source, component, SETTINGS, SETTING)
        listed = settings.get("added_tokens_decoder", {})
        named = {role: settings[role] for role in ROLES if settings.get(role)}
        if not listed:
            said = _described(source, component, SPECIAL, NAMED)
            named |= {role: said[role] for role in ROLES if said.get(role)}
        added = {int(index): token for index, token in listed.items() if index.isdecimal()}
        return cls(named, dict(sorted(added.items())), settings.get("extra_ids", EXTRA_IDS))

    def text(self, role: str) -> str:
        """The token of a role, CLIP's where the folder does not say."""
        return _content(self.named.get(role, CLIP_ROLES[role]))


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _described(source: Source, component: str, name: str, check: schema.Schema) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    path = source.finds(component, name)
    if path is None:
        return {}
    said = read_description(path)
    try:
        check(said, "")
    except schema.MismatchError as error:
        raise ArtifactError(f"{path}: {error}; download it again") from error
    return said


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise AdapterError(f"prompts need the package {name}: pip install 'mlxquant[{EXTRA}]'") from error


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: not a tokenizer's, or damaged ({reason(error)}); download it again")


def clip_tokenizer(source: Source, component: str) -> Callable[..., mx.array]:
    """CLIP's tokenizer.

    Args:
        source: Where the model is.
        component: Such as "tokenizer_2".

    Returns:
        A function ``(texts, length=77)`` to ids int32 [B,length]: the begin token, the text, which is cut where it is
        too long, the end token, and padding.

    Raises:
        AdapterError: Without the package tokenizers.
        ArtifactError: A file is missing or damaged, or the vocabulary lacks a special token.
    """
    library, special = _package("tokenizers"), Special.read(source, component)
    fast = source.finds(component, FAST) if source.finds(component, VOCABULARY) is None else None
    path = fast or source.file(component, VOCABULARY)
    tokenizer = _read_fast(library, fast) if fast else _made_clip(library, source, component, special)
    pad = tokenizer.token_to_id(special.text("pad_token"))
    if pad is None:
        raise ArtifactError(f"{path}: lacks {special.text('pad_token')!r}, the pad_token; the file is another model's")

    def tokenize(texts: Sequence[str], length: int = CLIP_TOKENS) -> mx.array:
        _check_length(length, 2)
        tokenizer.enable_truncation(length)
        return _padded([_encoded(tokenizer, text) for text in texts], length, pad)[0]

    return tokenize


def t5_tokenizer(source: Source, component: str) -> Callable[[Sequence[str], int], tuple[mx.array, mx.array]]:
    """T5's tokenizer.

    Args:
        source: Where the model is.
        component: Such as "tokenizer_3".

    Returns:
        A function ``(texts, length)`` to ids and a mask, both int32 [B,length]: the text, which is cut where it is too
        long, the end token, and padding; the mask is 0 over padding, else 1.

    Raises:
        AdapterError: Without the package tokenizers, or without sentencepiece where there is no tokenizer.json.
        ArtifactError: A file is missing or damaged, or the vocabulary lacks a special token.
    """
    special = Special.read(source, component)
    fast = source.finds(component, FAST)
    encode, pad = _fast_t5(fast) if fast else _pieces(source.file(component, PIECES), special)

    def tokenize(texts: Sequence[str], length: int) -> tuple[mx.array, mx.array]:
        _check_length(length, 1)
        return _padded([encode(text, length) for text in texts], length, pad)

    return tokenize


def _read_fast(library: Any, path: Path) -> Any:
    """A ``tokenizer.json``, with nothing padded or cut."""
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise _damaged(path, error) from error
    tokenizer.no_padding()
    return tokenizer


def _made_clip(library: Any, source: Source, component: str, special: Special) -> Any:
    """A tokenizer as transformers makes it of CLIP's vocabulary and merges."""
    path, merges = source.file(component, VOCABULARY), source.file(component, MERGES)
    parts, split = library.normalizers, library.pre_tokenizers
    try:
        schema.table_of(schema.whole(), 1)(read_description(path), "")
        pairs = library.models.BPE.read_file(str(path), str(merges))
        made = library.models.BPE(*pairs, unk_token=special.text("unk_token"), end_of_word_suffix="</w>")
    except Exception as error:  # the package raises Exception itself
        raise _damaged(path, error) from error
    tokenizer = library.Tokenizer(made)
    ids = {role: tokenizer.token_to_id(special.text(role)) for role in CLIP_ROLES}
    if missing := next((role for role, index in ids.items() if index is None), None):
        raise ArtifactError(f"{path}: lacks {special.text(missing)!r}, the {missing}; the file is another model's")
    begin, end = ((special.text(role), ids[role]) for role in ("bos_token", "eos_token"))
    space = parts.Replace(library.Regex(r"\s+"), " ")
    tokenizer.normalizer = parts.Sequence([parts.NFC(), space, parts.Lowercase()])
    words = split.Split(library.Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split.Sequence([words, split.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = library.processors.RobertaProcessing(end, begin, False, False)
    tokenizer.add_tokens([_added(library, token) for token in special.added.values()])
    listed = {token["content"]: token for token in special.added.values()}
    named = {**CLIP_ROLES, **special.named}
    for token in (named[role] for role in ROLES if role in named):
        tokenizer.add_special_tokens([_added(library, listed.get(_content(token), token))])
    return tokenizer


def _added(library: Any, token: str | dict[str, Any]) -> Any:
    """A token of a folder's as the package has it: in the text of a prompt it is found before the text is split."""
    if isinstance(token, str):
        return library.AddedToken(token, special=True, normalized=False)
    return library.AddedToken(token["content"], **{name: token[name] for name in OPTIONS if name in token})


def _fast_t5(path: Path) -> tuple[Callable[[str, int], list[int]], int]:
    """T5's tokenizer from a ``tokenizer.json``, text and length to ids, and the id of padding."""
    tokenizer = _read_fast(_package("tokenizers"), path)
    pad, end = (tokenizer.token_to_id(token) for token in ("<pad>", "</s>"))
    if pad is None or end is None:
        raise ArtifactError(f"{path}: lacks <pad> or </s>, which T5 has; the file is another model's")

    def encode(text: str, length: int) -> list[int]:
        tokenizer.enable_truncation(length)
        return _encoded(tokenizer, text)

    return encode, pad


def _pieces(path: Path, special: Special) -> tuple[Callable[[str, int], list[int]], int]:
    """T5's own tokenizer, text and length to ids, and the id of padding. sentencepiece knows no special tokens in a
    text: it gets what is between them.
    """
    try:
        model = _package("sentencepiece").SentencePieceProcessor(model_proto=path.read_bytes())
        size, end, pad = model.get_piece_size(), model.eos_id(), model.pad_id()
    except (OSError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    if end < 0 or pad < 0:
        raise ArtifactError(f"{path}: lacks <pad> or </s>, which T5 has; the file is another model's")
    ids = {model.id_to_piece(index): index for index in (end, pad, model.unk_id())}
    ids |= {f"<extra_id_{index}>": size + special.extra_ids - 1 - index for index in range(special.extra_ids)}
    ids |= {token["content"]: index for index, token in special.added.items()}
    parts = re.compile("(" + "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) + ")")

    def encode(text: str, length: int) -> list[int]:
        found: list[int] = []
        for part in parts.split(_checked(text)):
            found += [ids[part]] if part in ids else model.encode(part)
        return [*found[: length - 1], end]

    return encode, pad


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(_checked(text)).ids)


def _checked(text: str) -> str:
    """A prompt that can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(f"prompt {text!r}: has half of a character; write it anew") from error
    return text


def _check_length(length: int, least: int) -> None:
    if length < least:
        raise AdapterError(
            f"prompts of {length} tokens have no place for the begin and the end; expected {least} or more"
        )


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[mx.array, mx.array]:
    """Ids and mask [B,length] int32."""
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return mx.array(ids), mx.array(mask)
