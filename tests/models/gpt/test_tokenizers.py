"""The two tokenizers: every text comes back, and transformers reads the same ids from what they describe."""

import json

import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models.gpt.tokenizers import ByteTokenizer, CharTokenizer, tokenizer_for, tokenizer_from_facts

TEXT = "def f(x):\n\treturn  x + 1  # naïve — 量子化 🙂\r\n\x00 'quoted' it's  \u00a0end \n\n"


def both():
    return [ByteTokenizer(), CharTokenizer(TEXT)]


@pytest.mark.parametrize("tokenizer", both(), ids=lambda t: t.level)
def test_every_text_comes_back(tokenizer):
    for text in (TEXT, TEXT[::2], "", "x"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", both(), ids=lambda t: t.level)
def test_facts_make_the_same_tokenizer(tokenizer):
    again = tokenizer_from_facts(json.loads(json.dumps(tokenizer.facts)))
    assert type(again) is type(tokenizer)
    assert again.facts == tokenizer.facts
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_bytes_are_the_ids():
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_an_unknown_character_is_named():
    with pytest.raises(AdapterError, match="'z' at place 2 is not among the 2"):
        CharTokenizer("ab").encode("abz")
    with pytest.raises(AdapterError, match="no characters"):
        CharTokenizer("")


@pytest.mark.parametrize("facts", [{}, {"level": "word"}, {"level": "char"}])
def test_foreign_facts_are_refused(facts):
    with pytest.raises(ArtifactError, match="a tokenizer's facts"):
        tokenizer_from_facts(facts)


def test_a_level_and_a_text_choose_a_tokenizer():
    assert tokenizer_for("byte", TEXT).vocab_size == 256
    assert tokenizer_for("char", "hello").characters == "ehlo"


@pytest.mark.parametrize("tokenizer", both(), ids=lambda t: t.level)
def test_tokenizers_reads_the_same_ids(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"])
    for text in (TEXT, "  x x ", "'s 's", TEXT[::-1]):
        assert theirs.encode(text).ids == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
