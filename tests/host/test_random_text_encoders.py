"""The files of the text encoders: reproducible, and the same in a hub cache and in a folder."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.diffusionkit


def contents(folder: Path, inside: str = "*"):
    return {file.name: file.read_bytes() for file in folder.glob(inside) if file.is_file()}


def test_a_seed_gives_the_same_bytes(random_sd3, sd3_folder, tmp_path):
    again = random_sd3.write_folder(tmp_path / "again")
    files = {path.relative_to(sd3_folder) for path in sd3_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == files
    for path in files:
        assert (again / path).read_bytes() == (sd3_folder / path).read_bytes(), path


def test_hub_cache_and_folder_hold_the_same_files(random_sd3, hub_cache, sd3_folder):
    transformer, text, t5 = (
        random_sd3.snapshot(hub_cache, name) for name in (random_sd3.MMDIT, random_sd3.TEXT, random_sd3.T5_CONFIG)
    )
    assert contents(transformer)["sd3_medium.safetensors"] == (sd3_folder / "sd3_medium.safetensors").read_bytes()
    for folder in ("clip_l", "clip_g", "tokenizer_l", "tokenizer_g"):
        assert contents(text / folder) == contents(sd3_folder / folder)
    assert contents(text / "t5") | contents(t5) == contents(sd3_folder / "t5")


def test_the_end_of_a_prompt_is_the_largest_id(random_sd3, tmp_path):
    """At CLIP's real vocabulary, too."""
    for count in (600, 49408):
        random_sd3.write_clip_tokenizer(tmp_path, count)
        vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        assert len(vocabulary) == count
        assert sorted(vocabulary.values()) == list(range(count))
        assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (count - 2, count - 1)
        merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").strip().split("\n")[1:]
        pairs = [line.split() for line in merges]
        assert all(len(pair) == 2 and set(pair) | {"".join(pair)} <= vocabulary.keys() for pair in pairs)
