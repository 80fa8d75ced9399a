"""``mlxquant compare-images``: pairs by name, the metrics of everything else, and one clear error on what is no
pair.
"""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlxquant.evaluation import report_folder
from mlxquant.evaluation.image_folders import read_picture
from mlxquant.files.checked import read_json
from mlxquant.metrics import inception, sets
from mlxquant.metrics.catalog import METRICS
from mlxquant.metrics.psnr import psnr
from mlxquant.metrics.ssim import ssim

from support.command_line import fail, succeed


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """The page has its own tests."""
    monkeypatch.setattr(report_folder, "write_page", lambda folder: folder)


def picture(seed, width=24, height=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folders(tmp_path):
    """Two folders with a pair of PNGs, a PNG with a JPEG of another size, and what is no picture."""
    for name, seed in (("a", 0), ("b", 10)):
        (tmp_path / name).mkdir()
        picture(seed).save(tmp_path / name / "cat.png")
    picture(1, 30, 20).save(tmp_path / "a" / "dog.png")
    picture(1, 30, 20).save(tmp_path / "b" / "dog.JPG", format="JPEG")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    return tmp_path / "a", tmp_path / "b"


def report_of(folder):
    return read_json(folder / "report.json", "evaluation")


def test_pairs_are_measured_and_copied(folders, tmp_path):
    facts, said = succeed("compare-images", *folders, "--out", tmp_path / "r")
    report = report_of(tmp_path / "r")
    assert [row["name"] for row in report["prompts"]] == ["cat", "dog"]
    (result,) = report["results"]
    pairs = [
        (read_picture(folders[1] / own), read_picture(folders[0] / exact))
        for own, exact in (("cat.png", "cat.png"), ("dog.JPG", "dog.png"))
    ]
    assert result["each"] == {
        "psnr_db": [float(psnr(*pair)[0]) for pair in pairs],
        "ssim": [float(ssim(*pair)[0]) for pair in pairs],
    }
    assert result["psnr_db"] == np.mean(result["each"]["psnr_db"])
    assert result["model_bytes"] is None
    assert facts["results"][0]["psnr_db"] == result["psnr_db"]
    assert "PSNR" in said
    with (
        Image.open(tmp_path / "r" / "images" / "b" / "0001.png") as copied,
        Image.open(folders[1] / "dog.JPG") as given,
    ):
        np.testing.assert_array_equal(np.asarray(copied), np.asarray(given))
    assert sorted(os.listdir(tmp_path / "r")) == ["images", "report.csv", "report.json"]


def test_equal_pictures_and_one_picture_have_stated_limits(folders, tmp_path):
    for folder in folders:
        for path in folder.iterdir():
            if path.stem != "cat":
                path.unlink()
    succeed("compare-images", folders[0], folders[0], folders[1], "--out", tmp_path / "r")
    report = report_of(tmp_path / "r")
    assert [row["name"] for row in report["results"]] == ["a-2", "b"]
    assert report["results"][0]["psnr_db"] == 100
    assert report["results"][0]["ssim"] == pytest.approx(1)
    assert report["results"][0]["psnr_db_interval"] is None
    assert report["notes"] == ["One picture only: its figures have no intervals."]
    assert all(math.isfinite(value) for row in report["results"] for value in row["each"]["psnr_db"])
    table = (tmp_path / "r" / "report.csv").read_text().lower()
    assert "nan" not in table
    assert "inf" not in table


def damage(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (b / "cat.png").unlink(), "b: has no partner for 1 of the pictures in"),
        (lambda a, b: picture(5).save(b / "fox.png"), "a: has no partner for 1 of the pictures in"),
        (lambda a, b: picture(5, 25).save(b / "cat.png"), "cat.png: 25x16 pixels"),
        (lambda a, b: damage(b / "cat.png"), "cat.png: damaged picture"),
        (lambda a, b: (b / "cat.png").write_bytes(b""), "cat.png: not a PNG or JPEG"),
        (lambda a, b: (b / "cat.png").write_text("hello"), "cat.png: not a PNG or JPEG"),
        (lambda a, b: picture(5).save(b / "cat.jpeg"), "have one name"),
        (lambda a, b: Image.fromarray(np.zeros((16, 24), np.uint16)).save(b / "cat.png"), "expected an 8-bit picture"),
        (lambda a, b: [path.unlink() for path in b.iterdir()], "b: holds no pictures"),
        (lambda a, b: [picture(5, 8, 8).save(folder / "cat.png") for folder in (a, b)], "no window of 11"),
    ],
)
def test_what_is_no_pair_is_one_clear_error(folders, tmp_path, change, message):
    change(*folders)
    said = fail("compare-images", *folders, "--out", tmp_path / "r")
    assert message in said
    assert not (tmp_path / "r").exists()


def test_arguments_are_checked_first(folders, tmp_path):
    assert "No such file" in fail("compare-images", folders[0], tmp_path / "none", "--out", tmp_path / "r")
    assert "--prompts" in fail("compare-images", *folders, "--metric", "clip-score", "--out", tmp_path / "r")
    (tmp_path / "p.txt").write_text("1\ta cat\n")
    assert "1 prompts for 2 pictures" in fail(
        "compare-images", *folders, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "r"
    )
    wrong = fail(
        "compare-images",
        tmp_path / "none",
        folders[1],
        "--metric",
        "fid",
        "--weights",
        "fad=x",
        "--out",
        tmp_path / "r",
    )
    assert "no metric 'fad'" in wrong
    succeed("compare-images", *folders, "--out", tmp_path / "r")
    assert "--force" in fail("compare-images", *folders, "--out", tmp_path / "r")


def test_local_weights_are_used_and_named(folders, tmp_path, monkeypatch):
    """Of a network that is not the published one nothing is called FID."""
    networks = []

    def load(place):
        networks.append(place)
        return sets.frechet(lambda images: images.mean((1, 2)), f"net of {place.name}", inception=False)

    monkeypatch.setitem(METRICS, "fid", replace(METRICS["fid"], _load=load))
    file = tmp_path / inception.WEIGHTS.files[0]
    file.touch()
    succeed("compare-images", *folders, "--metric", "fid", "--weights", f"fid={file}", "--out", tmp_path / "r")
    assert networks == [file]
    row = next(row for row in report_of(tmp_path / "r")["metrics"] if row["key"] == "frechet_distance")
    assert row["network"] == f"net of {file.name}"


def test_transparency_shows_white_and_grey_is_three_channels(tmp_path):
    Image.new("RGBA", (2, 1), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "clear.png"), np.ones((1, 1, 2, 3)))
    Image.new("L", (2, 1), 51).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_picture(tmp_path / "grey.png"), np.full((1, 1, 2, 3), 0.2), rtol=1e-6)
