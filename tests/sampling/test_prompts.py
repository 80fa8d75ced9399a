"""Prompt files are read strictly and written whole; the shipped ones are disjoint."""

from pathlib import Path

import pytest

from mlxquant.errors import ArtifactError, CalibrationError
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.models.shapes.scenes import parse
from mlxquant.sampling.prompts import Prompt, read_prompts, write_prompts

FOLDER = Path(__file__).parents[2] / "calibration"


def test_written_prompts_are_read_back(tmp_path):
    prompts = [Prompt(3, "a cat"), Prompt(0, "ein Bär, groß")]
    write_prompts(tmp_path / "p.txt", prompts)
    assert read_prompts(tmp_path / "p.txt") == prompts


def test_comments_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "p.txt").write_text("# seeds\n\n4\ta dog \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt(4, "a dog")]


@pytest.mark.parametrize("line", ["a cat", "x\ta cat", "-1\ta cat", "3\t", "3 a cat", "1.5\ta cat"])
def test_malformed_lines_are_named(tmp_path, line):
    (tmp_path / "p.txt").write_text(f"1\tfine\n{line}\n")
    with pytest.raises(CalibrationError, match="line 2: expected 'seed<TAB>prompt'"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_empty_files_are_refused(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(CalibrationError, match="holds no prompts"):
        read_prompts(tmp_path / "p.txt")


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes(b"1\t\xff\xfe")
    with pytest.raises(CalibrationError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(("purpose", "least"), [("calibration", 64), ("evaluation", 256)])
def test_shipped_files_are_the_models_own_prompts(purpose, least):
    prompts = read_prompts(FOLDER / f"shapes-{purpose}.txt")
    assert len(prompts) >= least
    assert prompts == MMDiTShapes.pretrained().prompts(purpose, len(prompts))
    assert all(parse(p.text).held_out == (purpose == "evaluation") for p in prompts)


def test_calibration_and_evaluation_are_disjoint():
    calibration, evaluation = (read_prompts(FOLDER / f"shapes-{p}.txt") for p in ("calibration", "evaluation"))
    assert not {p.text for p in calibration} & {p.text for p in evaluation}
    assert not {p.seed for p in calibration} & {p.seed for p in evaluation}
