"""How ranges and tiers change over time, on tables made by hand."""

import numpy as np
import pytest

from mlxquant.files.checked import read_json
from mlxquant.grids.tables import ActivationTable
from mlxquant.pipeline import temporal
from mlxquant.pipeline.quant_config import QuantConfig

SIGMAS = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
PATHS = ("blocks.0.image.attn.q_proj", "blocks.1.image.attn.q_proj", "blocks.0.text.mlp.fc1")


def config(spans, bits):
    tables = {}
    for path, span, b in zip(PATHS, spans, bits, strict=True):
        b = np.array(b, np.uint8)
        step = (np.array(span) / (2.0**b - 1)).astype(np.float32)
        tables[path] = ActivationTable(SIGMAS, step, np.zeros((4, 1), np.float32), b)
    layers = {path: {"always_a8": bool((table.bits == 8).all())} for path, table in tables.items()}
    return QuantConfig(
        {"parents": {"layer_statistics.json": "0" * 64}}, ("3", "2", "1", "0"), SIGMAS, tables, layers, {}, {}
    )


CONFIG = config([[1, 2, 3, 4], [5, 5, 5, 5], [9, 4, 4, 1]], [[4, 4, 6, 4], [8, 8, 8, 8], [8, 6, 6, 4]])


def test_the_range_and_not_the_step_is_compared_across_tiers():
    facts = temporal.analyze(CONFIG)["layers"]
    rising, constant, falling = (facts[path] for path in PATHS)
    assert constant["variation"] == pytest.approx(0, abs=1e-6)
    assert constant["max_over_min"] == pytest.approx(1)
    assert rising["max_over_min"] == pytest.approx(4)
    assert rising["variation"] == pytest.approx(np.std([1, 2, 3, 4]) / 2.5)
    assert rising["trend"] == pytest.approx(1)
    assert -1 < falling["trend"] < -0.9  # a tie in the middle


def test_switchers_always_a8_and_streams():
    analysis = temporal.analyze(CONFIG)
    assert analysis["switchers"] == [PATHS[0], PATHS[2]]
    assert analysis["always_a8"] == [PATHS[1]]
    assert analysis["layers"][PATHS[0]]["switches"] == 2
    assert set(analysis["streams"]) == {"blocks.*.image", "blocks.*.text"}
    image = analysis["streams"]["blocks.*.image"]
    assert (image["layers"], image["switchers"]) == (2, 1)
    assert image["mean_bits"] == pytest.approx(np.mean([4.5, 8]))


def test_spearman_is_of_ranks():
    x = np.array([0.1, 0.2, 0.5, 0.9])
    assert temporal.spearman(x, np.exp(10 * x)) == pytest.approx(1)
    assert temporal.spearman(x, -x) == pytest.approx(-1)
    assert temporal.spearman(x, np.ones(4)) == 0
    assert temporal.spearman(x, np.array([1, 2, 2, 3])) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert temporal.spearman(x[:1], x[:1]) == 0


def test_the_file_names_its_config(tmp_path):
    temporal.write(tmp_path / "t.json", temporal.analyze(CONFIG), CONFIG, "mine.json")
    assert temporal.config_of(tmp_path / "t.json") == "mine.json"
    data = read_json(tmp_path / "t.json", "temporal-analysis")
    assert data["parents"] == CONFIG.facts["parents"]
