"""Values, intervals and differences, against plain NumPy."""

from pathlib import Path

import numpy as np
import pytest

from mlxquant.evaluation.figures import Judge, PictureSet, differences
from mlxquant.metrics.bootstrap import interval
from mlxquant.metrics.catalog import Metric, metric
from mlxquant.metrics.psnr import psnr
from mlxquant.metrics.sets import SetMetric
from mlxquant.progress import silent

TEXTS = ["red", "green", "red green"]
RNG = np.random.default_rng(0)
EXACT = RNG.random((3, 12, 12, 3), np.float32)
OTHER = np.clip(EXACT + 0.1 * RNG.standard_normal(EXACT.shape), 0, 1).astype(np.float32)


def pictures(name, images):
    return PictureSet(name, name, lambda: iter([images[:2], images[2:]]))


def brightness(images, texts):
    """A judge that marks every word, so that longer texts count more."""
    light = [bool(image.mean() > 0.5) for image in images]
    return [dict.fromkeys(text.split(), one) for one, text in zip(light, texts, strict=True)]


def fake(needs, score):
    return Metric("fake", "Fake", "fake", needs, False, "", lambda place: score)


def test_pairs_are_scored_batch_by_batch():
    judge = Judge([metric("psnr")], TEXTS)
    figures = judge.score(pictures("b", OTHER), pictures("a", EXACT), silent)
    expected = psnr(OTHER, EXACT)
    assert figures["each"] == {"psnr_db": expected.tolist()}
    assert figures["psnr_db"] == expected.mean()
    assert figures["psnr_db_interval"] == interval(expected)
    alone = judge.score(pictures("a", EXACT), None, silent)
    assert (alone["psnr_db"], alone["psnr_db_interval"], alone["each"]) == (None, None, {})
    assert "accuracy" not in alone
    assert alone["attributes"] is None


def test_the_models_own_judgement_is_over_all_pictures():
    light = np.stack([np.full((12, 12, 3), value, np.float32) for value in (0.9, 0.1, 0.9)])
    judge = Judge([], TEXTS, brightness)
    figures = judge.score(pictures("a", light), None, silent)
    assert figures["accuracy"] == 0.75  # 3 of 4 words, 2 of 3 pictures
    assert figures["each"]["accuracy"] == [1, 0, 1]
    assert figures["attributes"] == {"green": 0.5, "red": 1.0, "mean": 0.75}
    assert figures["accuracy_interval"] == interval([1, 0, 1], [1, 1, 2])
    assert judge.table(accuracy=True)[-1]["key"] == "accuracy"
    assert judge.table(accuracy=False) == []


def test_metrics_get_what_they_need():
    seen = []

    def prompts(images, texts):
        seen.append(texts)
        return np.arange(len(texts), dtype=float)

    figures = Judge([fake("prompts", prompts)], TEXTS).score(pictures("a", EXACT), None, silent)
    assert seen == [["red", "green"], ["red green"]]
    assert figures["each"]["fake"] == [0, 1, 0]
    alone = Judge([fake("alone", lambda images: images.mean((1, 2, 3)))]).score(pictures("a", EXACT), None, silent)
    assert alone["fake"] == pytest.approx(EXACT.mean((1, 2, 3)).mean())


def test_distances_of_sets_carry_their_size_and_a_warning():
    encoded = []

    def encode(images):
        encoded.append(len(images))
        return images.mean((1, 2))

    distance = SetMetric("frechet_distance", encode, lambda x, y: float(np.abs(x.mean(0) - y.mean(0)).sum()), "means")
    judge = Judge([fake("sets", distance)], TEXTS)
    figures = judge.score(pictures("b", OTHER), pictures("a", EXACT), silent)
    assert figures["frechet_distance"] == pytest.approx(
        np.abs(OTHER.mean((0, 1, 2)) - EXACT.mean((0, 1, 2))).sum(), rel=1e-4
    )
    assert (figures["frechet_distance_samples"], figures["frechet_distance_interval"]) == (3, None)
    assert len(judge.notes) == 1
    assert "3 pictures" in judge.notes[0]
    judge.score(pictures("b", OTHER), pictures("a", EXACT), silent)
    assert len(judge.notes) == 1
    assert encoded == [2, 1, 2, 1, 2, 1]  # the reference once
    (row,) = judge.table(accuracy=False)
    assert (row["key"], row["title"], row["per_image"]) == ("frechet_distance", "Frechet distance", False)
    assert row["network"] == "means"
    assert judge.score(pictures("a", EXACT), None, silent)["frechet_distance"] is None


def test_a_network_looks_once_for_all_metrics_with_its_weights():
    """FID and KID share Inception's features, unless one of them was given weights of its own."""
    looked = []

    def load(place):
        def encode(images):
            looked.append((place, len(images)))
            return images.mean((1, 2)) * (1 if place is None else 2)

        return SetMetric("kid", encode, lambda x, y: float(np.abs(x.mean(0) - y.mean(0)).sum()), "means")

    rows = [Metric(name, name, name, "sets", False, "", load) for name in ("a", "b", "c")]
    judge = Judge(rows[:2])
    judge.score(pictures("b", OTHER), pictures("a", EXACT), silent)
    judge.score(pictures("c", OTHER), pictures("a", EXACT), silent)
    assert looked == [(None, 2), (None, 1)] * 3
    looked.clear()
    own = Path("own.pth")
    judge = Judge([rows[0], rows[2]], places={"c": own})
    judge.score(pictures("b", OTHER), pictures("a", EXACT), silent)
    assert looked == [*[(None, 2), (None, 1)] * 2, *[(own, 2), (own, 1)] * 2]


def test_differences_are_paired():
    models = [
        {"name": name, "each": {"psnr_db": values}}
        for name, values in (("a", [1.0, 2.0]), ("b", [3.0, 5.0]), ("c", [0.0, 0.0]))
    ]
    reference = {"name": "fp", "each": {}}
    rows = differences([{"key": "psnr_db"}, {"key": "ssim"}], reference, models)
    assert [(row["a"], row["b"], row["mean"]) for row in rows] == [("b", "a", 2.5), ("c", "a", -1.5)]
    assert rows[0]["interval"] == interval([2.0, 3.0])


def test_differences_of_accuracy_count_attributes_as_accuracy_does():
    asked = [5.0, 6.0, 6.0]
    models = [{"name": name, "each": {"accuracy": values, "asked": asked}} for name, values in (
        ("a", [0.0, 1.0, 0.5]), ("b", [1.0, 1.0, 1.0])
    )]  # fmt: skip
    row = differences([{"key": "accuracy"}], {"name": "fp", "each": {}}, models)[0]
    assert row["mean"] == pytest.approx((5 + 0 + 3) / 17)
    assert row["interval"] == interval([1.0, 0.0, 0.5], asked)
