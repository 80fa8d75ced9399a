"""``mlxquant quantize`` says how much stays in float, and refuses at once where that is too much."""

from importlib import import_module

import pytest

from mlxquant.models.shapes.adapter import MMDiTShapes

from support.command_line import fail, succeed
from support.tiny_pictures import tiny_adapter

COMMAND = ["quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w4a16", "--num-prompts", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))


def test_it_is_said_by_reason(tmp_path):
    facts, said = succeed(*COMMAND, "--require-share", "0.5", "--out", tmp_path / "q")
    assert 0.5 < facts["share"]["parameters"] < 1
    assert facts["share"]["kept"]["bias"]["parameters"] > 0
    assert "% of the parameters and" in said
    assert "(runs once a prompt)" in said


def test_less_than_is_required_is_refused_before_anything_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("mlxquant.quantize"), "calibrated", None)
    said = fail(*COMMAND, "--override", "@mlp=keep", "--require-share", "0.95", "--out", tmp_path / "q", code=1)
    assert "% of the parameters, and 95.0 % are required" in said
    assert "(refused by the recipe)" in said
    assert not (tmp_path / "q").exists()
