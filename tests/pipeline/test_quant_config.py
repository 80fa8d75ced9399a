"""The config's files: everything comes back, a step is a step, and damage is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mlxquant.errors import ArtifactError, MlxQuantError
from mlxquant.files.checked import read_json, write_json
from mlxquant.grids.tables import ActivationTable
from mlxquant.methods.inputs.clipping import affine_table
from mlxquant.pipeline.divisions import Division
from mlxquant.pipeline.quant_config import QuantConfig

MADE_FROM = {"model": "m", "source": "a", "calibration": "b"}
DECIDED = {"shifted": False, "relative_error": 0.1}
SIGMAS = np.array([0.1, 0.5, 0.9], np.float32)


def table(width=1, seed=0):
    rng = np.random.default_rng(seed)
    step, shift = rng.uniform(0.01, 0.1, 3).astype(np.float32), rng.normal(size=(3, width)).astype(np.float32)
    return ActivationTable(SIGMAS, step, shift, np.array([4, 6, 8], np.uint8))


def config():
    smooth = {
        "b.0.q": Division(
            ("b.0.q", "b.0.k"),
            np.array([1, 2], np.float32),
            True,
            {"ratio": 7.5},
            {"b.0.q": table(1, 3), "b.0.k": table(1, 4)},
        ),
        "b.1.q": Division(("b.1.q",), np.array([3, 2], np.float32), False, {"ratio": 6.0}, {}),
    }
    migration = {
        "b.0.fc2": Division(("b.0.fc2",), np.array([1, 4], np.float32), True, {"largest": 4}, {"b.0.fc2": table(2, 5)})
    }
    plain = {"b.0.q": table(1), "b.0.k": table(1, 1), "b.1.q": table(1, 6), "b.0.fc2": table(2, 2)}
    layers = {path: {**DECIDED, "always_a8": False} for path in plain}
    return QuantConfig(MADE_FROM, ("step_20", "step_9", "step_0"), SIGMAS, plain, layers, smooth, migration)


def same(a, b):
    assert set(a) == set(b)
    for path in a:
        for name in ("sigma", "step", "shift", "bits"):
            found, expected = getattr(a[path], name), getattr(b[path], name)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


def test_everything_comes_back(tmp_path):
    written = config()
    written.write(tmp_path / "quant_config.json")
    read = QuantConfig.read(tmp_path / "quant_config.json")
    assert (read.facts, read.step_keys, read.layers) == (written.facts, written.step_keys, written.layers)
    for flags in ({}, {"smoothed": True}, {"migrated": True}, {"smoothed": True, "migrated": True}):
        same(read.tables(**flags), written.tables(**flags))
    assert {p: d.facts for p, d in read.smoothquant.items()} == {p: d.facts for p, d in written.smoothquant.items()}
    assert read.smoothquant["b.0.q"].layers == ("b.0.q", "b.0.k")
    assert set(read.divisors) == {"b.0.q"}
    np.testing.assert_array_equal(read.divisors["b.0.q"], [1, 2])
    np.testing.assert_array_equal(read.migrations["b.0.fc2"], [1, 4])
    assert read.mean_bits == 6


def test_logarithmic_entries_come_back_and_are_the_only_ones_to_be_marked(tmp_path):
    log = np.array([True, False, True])
    mixed = replace(
        config(), plain={"b.0.q": replace(table(), log=log), "b.0.fc2": replace(table(2), log=~log), "b.1.q": table()}
    )
    mixed.write(tmp_path / "quant_config.json")
    read = QuantConfig.read(tmp_path / "quant_config.json")
    assert {path: t.log.tolist() for path, t in read.plain.items()} == {
        path: t.log.tolist() for path, t in mixed.plain.items()
    }
    entries = json.loads((tmp_path / "quant_config.json").read_text())["per_timestep"]
    assert [[path for path, e in sorted(entries[key].items()) if "log" in e] for key in mixed.step_keys] == [
        ["b.0.q"],
        ["b.0.fc2"],
        ["b.0.q"],
    ]


def test_divided_entries_stand_beside_the_plain_ones():
    c = config()
    plain, smoothed = c.tables(), c.tables(smoothed=True)
    assert plain["b.0.q"] is c.plain["b.0.q"]
    assert smoothed["b.0.q"] is c.smoothquant["b.0.q"].tables["b.0.q"]
    assert smoothed["b.1.q"] is plain["b.1.q"]  # a candidate that was not applied
    assert smoothed["b.0.fc2"] is plain["b.0.fc2"]
    assert c.tables(migrated=True)["b.0.fc2"] is c.migration["b.0.fc2"].tables["b.0.fc2"]


def test_the_json_is_what_the_pipeline_promises(tmp_path):
    c = config()
    c.write(tmp_path / "quant_config.json")
    data = read_json(tmp_path / "quant_config.json", "quant-config")
    assert data["sigma_map"] == {key: float(s) for key, s in zip(c.step_keys, SIGMAS, strict=True)}
    entry = data["per_timestep"]["step_9"]["b.0.q"]
    assert entry == {"bits": 6, "scale": float(c.plain["b.0.q"].step[1]), "shift": float(c.plain["b.0.q"].shift[1, 0])}
    assert data["per_timestep"]["step_9"]["b.0.fc2"]["shift"] is None
    first = data["smoothquant"]["b.0.q"]
    assert (first["ratio"], first["applied"], first["layers"]) == (7.5, True, ["b.0.q", "b.0.k"])
    assert set(first["per_timestep"]["step_0"]) == {"b.0.q", "b.0.k"}
    with np.load(tmp_path / "quant_config.npz") as vectors:
        assert set(vectors.files) == {
            "b.0.fc2__shift", "b.0.fc2__migrated_shift", "b.0.fc2__divisor", "b.0.q__divisor", "b.1.q__divisor"
        }  # fmt: skip
        np.testing.assert_array_equal(vectors["b.0.fc2__shift"], c.plain["b.0.fc2"].shift)


def test_paths_are_relative_and_equal_configs_are_equal_bytes(tmp_path):
    """Nothing in a config says where it lies, so it can be moved."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        config().write(tmp_path / folder / "quant_config.json")
    assert str(tmp_path) not in (tmp_path / "a" / "quant_config.json").read_text()
    for name in ("quant_config.json", "quant_config.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "a").rename(tmp_path / "moved")
    assert QuantConfig.read(tmp_path / "moved" / "quant_config.json").mean_bits == 6


def test_scale_is_a_step_and_every_code_is_used(tmp_path):
    """An absolute maximum used as a step would leave 3 levels, and half of an asymmetric range would collapse."""
    low, high = -0.3, 7.7
    plain = {"layer": affine_table(SIGMAS, np.full(3, low), np.full(3, high), 8)}
    QuantConfig(MADE_FROM, ("2", "1", "0"), SIGMAS, plain, {"layer": DECIDED}, {}, {}).write(
        tmp_path / "quant_config.json"
    )
    entry = json.loads((tmp_path / "quant_config.json").read_text())["per_timestep"]["1"]["layer"]
    x = np.linspace(low, high, 20_000)
    edge = 2 ** (entry["bits"] - 1)
    codes = np.rint((x - entry["shift"]) / entry["scale"])
    assert (codes.min(), codes.max()) == (-edge, edge - 1)  # nothing is clipped, the maximum included
    assert len(np.unique(codes)) == 256
    assert np.abs(codes * entry["scale"] + entry["shift"] - x).max() <= 0.501 * entry["scale"]


def test_damage_is_refused(tmp_path):
    path = tmp_path / "quant_config.json"
    with pytest.raises(ArtifactError, match="No such file"):
        QuantConfig.read(path)
    config().write(path)
    sidecar = tmp_path / "quant_config.npz"
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"quant_config\.npz.*changed"):
        QuantConfig.read(path)
    sidecar.unlink()
    with pytest.raises(ArtifactError, match=r"quant_config\.npz"):
        QuantConfig.read(path)
    sidecar.write_bytes(content)
    data = read_json(path, "quant-config")
    facts = {k: v for k, v in data.items() if k not in ("kind", "version", "migration")}
    write_json(path, "quant-config", facts)
    with pytest.raises(ArtifactError, match=r"it has no 'migration'; run analyze-activations again"):
        QuantConfig.read(path)
    path.write_text(path.read_text().replace('"bits": 8', '"bits": 6'))
    with pytest.raises(ArtifactError, match="checksum"):
        QuantConfig.read(path)


def test_numbers_are_finite_json(tmp_path):
    c = config()
    c.smoothquant["b.0.q"].facts["ratio"] = math.inf
    with pytest.raises(ValueError, match="JSON"):
        c.write(tmp_path / "quant_config.json")
    assert not (tmp_path / "quant_config.json").exists()


@pytest.mark.parametrize("name", ["/etc/quant_config.npz", "../quant_config.npz"])
def test_a_sidecar_outside_of_the_folder_is_refused(tmp_path, name):
    path = tmp_path / "quant_config.json"
    config().write(path)
    facts = {k: v for k, v in read_json(path, "quant-config").items() if k not in ("kind", "version")}
    write_json(path, "quant-config", {**facts, "sidecar": {**facts["sidecar"], "file": name}})
    with pytest.raises(ArtifactError, match=r"sidecar\.file names .* which is not inside its folder"):
        QuantConfig.read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 1e39},
        {"scale": -1},
        {"scale": 0},
        {"scale": "1"},
        {"bits": 2**40},
        {"bits": 5},
        {"shift": []},
        {"log": 1},
    ],
)
def test_entries_that_are_no_levels_are_refused(tmp_path, change):
    path = tmp_path / "quant_config.json"
    config().write(path)
    facts = {k: v for k, v in read_json(path, "quant-config").items() if k not in ("kind", "version")}
    next(iter(facts["per_timestep"].values()))["b.0.q"].update(change)
    write_json(path, "quant-config", facts)
    with pytest.raises(MlxQuantError, match=r"per_timestep\..*\.b\.0\.q\.\w+ is|every step must be positive"):
        QuantConfig.read(path)
