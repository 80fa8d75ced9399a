"""Messages: one line, not too long, and nothing in them that a file is full of."""

import json
import pickle

import pytest

import mlxquant as mq
from mlxquant.errors import LIMIT, ArtifactError, MlxQuantError, RecipeError, reason, shortened
from mlxquant.files.checked import read_json

from support.command_line import fail


def test_messages_are_one_line_of_at_most_500_characters():
    assert str(MlxQuantError("a\nb\r\nc")) == "a b c"
    assert str(MlxQuantError("a  b")) == "a  b"  # as a path may have it
    for length in (0, 1, LIMIT, LIMIT + 1, 10**7):
        said = str(ArtifactError("a" * length))
        assert len(said) == min(length, LIMIT)
    said = str(RecipeError("here: " + "x" * 10**6 + "; do this"))
    assert said.startswith("here: xxx")
    assert said.endswith("xxx; do this")
    assert " … " in said
    assert shortened(said) == said
    assert str(pickle.loads(pickle.dumps(ArtifactError("a" * 600)))) == str(ArtifactError("a" * 600))


def test_a_reason_never_quotes_what_could_not_be_decoded():
    with pytest.raises(UnicodeDecodeError) as caught:
        (b"\xff" + b"x" * 10**6).decode()
    assert len(repr(caught.value)) > 10**6
    assert reason(caught.value).startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0")
    assert reason(KeyError("a")) == "KeyError: 'a'"
    assert reason(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "prompts.txt"])
def test_files_of_megabytes_that_are_no_text_give_short_messages(tmp_path, name):
    path = tmp_path / name
    text = b'{"kind": "' + b"\xff" * 10**6
    path.write_bytes(len(text).to_bytes(8, "little") + text if path.suffix == ".safetensors" else text)
    with pytest.raises(MlxQuantError) as caught:
        mq.read_prompts(path) if path.suffix == ".txt" else mq.load(path)
    assert len(str(caught.value)) <= LIMIT


def test_commands_keep_to_it_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"kind": "x" * 10**6, "version": 1}))
    for arguments in (
        ["inspect", tmp_path / "a.json"],
        ["quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w" + "4" * 10**5, "--out", tmp_path / "out"],
        ["generate", "--model", "mmdit-shapes", "--prompt", "a", "--seed", "x" * 10**5, "--output", tmp_path / "a.png"],
    ):
        *usage, said = fail(*arguments).strip().splitlines()
        assert len(said) <= LIMIT + len("Error: ")
        assert sum(map(len, usage)) < LIMIT
    with pytest.raises(ArtifactError, match="expected a file of kind 'y'"):
        read_json(tmp_path / "a.json", "y")
