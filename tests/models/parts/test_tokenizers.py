"""Token ids against transformers' on texts of all kinds, and what is said of a tokenizer that cannot be read."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import json
import sys

import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.models.checkpoints.folder import DiffusersFolder
from mlxquant.models.parts.tokenizers import BEGIN, END, clip_tokenizer, t5_tokenizer

from support.odd_texts import has_stacked_marks, odd_texts
from support.parts import SIZE, pieces, write_clip_tokenizer, write_json, write_t5_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_clip_tokenizer(tmp_path, "tokenizer")
    write_clip_tokenizer(tmp_path, "tokenizer_2", pad="!")
    return tmp_path


def source(folder):
    return DiffusersFolder(str(folder))


@pytest.mark.diffusers
@pytest.mark.images
@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
def test_clip_ids_are_those_of_transformers(folder, component):
    from transformers import CLIPTokenizer

    theirs, ours = CLIPTokenizer.from_pretrained(folder / component), clip_tokenizer(source(folder), component)
    texts = odd_texts()
    for length in (77, 12, 2):
        said = theirs(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        np.testing.assert_array_equal(ours(texts, length), said)


@pytest.mark.diffusers
@pytest.mark.images
@pytest.mark.parametrize("listed", [False, True])
def test_clip_as_later_releases_write_it(folder, listed):
    """With the added tokens in tokenizer_config.json, or all in a tokenizer.json."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    place = folder / "tokenizer_2"
    for name in ("special_tokens_map.json", *(() if listed else ("vocab.json", "merges.txt"))):
        (place / name).unlink()
    if listed:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        added = {0: "!", SIZE - 2: BEGIN, SIZE - 1: END}
        settings = {"added_tokens_decoder": {str(at): {"content": text, **flags} for at, text in added.items()}}
        named = {"bos_token": BEGIN, "eos_token": END, "pad_token": "!", "unk_token": END}
        write_json(place / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **settings, **named})
        theirs = CLIPTokenizer.from_pretrained(place)
    else:
        theirs.save_pretrained(place)
    ours, texts = clip_tokenizer(source(folder), "tokenizer_2"), odd_texts()
    said = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ours(texts), said)


@pytest.mark.diffusers
@pytest.mark.images
@pytest.mark.parametrize("fast", [False, True])
def test_t5_ids_are_those_of_transformers(tmp_path, fast):
    from transformers import T5Tokenizer

    write_t5_tokenizer(tmp_path)
    theirs = T5Tokenizer.from_pretrained(tmp_path / "tokenizer")
    if fast:
        (tmp_path / "tokenizer" / "spiece.model").unlink()
        theirs.save_pretrained(tmp_path / "tokenizer")
    ours = t5_tokenizer(source(tmp_path), "tokenizer")
    texts = odd_texts() if fast else [text for text in odd_texts() if not has_stacked_marks(text)]
    for length in (512, 77, 1):
        said = theirs(texts, padding="max_length", max_length=length, truncation=True)
        ids, mask = ours(texts, length)
        for text, a, b in zip(texts, np.array(ids), said["input_ids"], strict=True):
            assert a.tolist() == b, repr(text)
        np.testing.assert_array_equal(mask, said["attention_mask"])


@pytest.mark.images
def test_a_t5_knows_its_sentinels(tmp_path):
    """They stand behind the pieces, the first of them last."""
    write_t5_tokenizer(tmp_path)
    ids, mask = t5_tokenizer(source(tmp_path), "tokenizer")(["<extra_id_0><extra_id_1>", ""], 4)
    assert (np.array(ids)[0, 0] - np.array(ids)[0, 1], np.array(ids)[0, 2], np.array(ids)[1, 0]) == (1, 1, 1)
    assert np.array(mask).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def spoilt(change):
    """``change`` made to a folder's tokenizer, whose place it gets."""
    return pytest.param(change, id=change.__name__)


def without_vocabulary(place):
    (place / "vocab.json").unlink()
    return "has no tokenizer/vocab.json; get it with"


def without_merges(place):
    (place / "merges.txt").unlink()
    return "has no tokenizer/merges.txt; get it with"


def no_json(place):
    (place / "vocab.json").write_text("{")
    return "vocab.json: not a tokenizer's, or damaged"


def ids_that_are_none(place):
    write_json(place / "vocab.json", {"a": -1})
    return "vocab.json: not a tokenizer's, or damaged (MismatchError: a is -1"


def other_merges(place):
    (place / "merges.txt").write_text("#version: 0.2\nq z\n")
    return "vocab.json: not a tokenizer's, or damaged"


def another_vocabulary(place):
    said = json.loads((place / "vocab.json").read_text())
    write_json(place / "vocab.json", {("end" if word == END else word): index for word, index in said.items()})
    return f"lacks {END!r}, the eos_token; the file is another model's"


def strange_roles(place):
    write_json(place / "special_tokens_map.json", {"pad_token": 3})
    return "special_tokens_map.json: pad_token is 3, expected an object"


def strange_padding(place):
    write_json(place / "special_tokens_map.json", {"pad_token": "<nothing>"})
    return "lacks '<nothing>', the pad_token"


def strange_settings(place):
    write_json(place / "tokenizer_config.json", {"added_tokens_decoder": {"0": "!"}})
    return "tokenizer_config.json: added_tokens_decoder.0 is '!', expected an object"


CLIP_FAULTS = [
    without_vocabulary, without_merges, no_json, ids_that_are_none, other_merges, another_vocabulary, strange_roles,
    strange_padding, strange_settings,
]  # fmt: skip


@pytest.mark.images
@pytest.mark.parametrize("change", [spoilt(change) for change in CLIP_FAULTS])
def test_what_is_said_of_a_clip_tokenizer(folder, change):
    message = change(folder / "tokenizer")
    with pytest.raises(ArtifactError) as error:
        clip_tokenizer(source(folder), "tokenizer")
    assert message in str(error.value)


@pytest.mark.images
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_what_is_said_of_a_damaged_t5_tokenizer(tmp_path, name):
    write_t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / name).write_bytes(b"{")
    with pytest.raises(ArtifactError, match=f"{name}: not a tokenizer's, or damaged"):
        t5_tokenizer(source(tmp_path), "tokenizer")
    (tmp_path / "tokenizer" / name).unlink()
    (tmp_path / "tokenizer" / "spiece.model").unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match=r"has no tokenizer/spiece.model; get it with"):
        t5_tokenizer(source(tmp_path), "tokenizer")


@pytest.mark.images
def test_a_spiece_model_of_another_kind(tmp_path):
    write_t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(pieces(pad_id=-1))
    with pytest.raises(ArtifactError, match="lacks <pad> or </s>, which T5 has"):
        t5_tokenizer(source(tmp_path), "tokenizer")


@pytest.mark.images
def test_prompts_that_are_none(folder):
    tokenize = clip_tokenizer(source(folder), "tokenizer")
    with pytest.raises(AdapterError, match="has half of a character"):
        tokenize(["\ud800"])
    with pytest.raises(AdapterError, match="prompts of 1 tokens have no place"):
        tokenize(["a"], 1)
    assert tokenize([]).shape == (0, 77)


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(AdapterError, match=r"the package tokenizers: pip install 'mlxquant\[images\]'"):
        clip_tokenizer(source(folder), "tokenizer")
