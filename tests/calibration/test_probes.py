"""Samples to differentiate on: rows side by side, a few of them, and what is held out."""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.data import OnDemand
from mlxquant.calibration.objectives import EveryNumber, GuidedPrediction, NextToken
from mlxquant.calibration.probes import HELD_OUT, Probes, shares
from mlxquant.calibration.recorded import RecordedCalibration
from mlxquant.calibration.text import TextCalibration
from mlxquant.calibration.trajectories import collect
from mlxquant.models.recorded.adapter import CALL, RecordedAdapter
from models.recorded.test_chain import recorded

from support import anybody
from support.synthetic_chain import Chain
from support.tiny_language import gpt_folder


@pytest.mark.parametrize("count", [2, 3, 8, 9, 16, 17, 100])
def test_shares_are_of_all_samples_and_have_none_in_common(count):
    learned, held = shares(count)
    assert sorted(learned + held) == list(range(count))
    assert learned
    assert len(held) == -(-count // HELD_OUT)
    assert held[-1] == count - 1


def test_a_single_sample_is_in_both_shares():
    assert shares(1) == ([0], [0])


@pytest.mark.parametrize(
    ("batches", "rows", "wanted"),
    [(10, 4, [2, 7]), (10, 1000, [*range(10)]), (10, 0, [5]), (3, 4, [0, 2]), (9, 6, [1, 4, 7])],
)
def test_a_few_are_evenly_spread(batches, rows, wanted):
    states = OnDemand(lambda index: {"x": mx.array([index])}, range(batches))
    all_of_them = Probes([float(i) for i in range(batches)], states, [(True, False)] * batches, 2, EveryNumber())
    few = all_of_them.few(rows)
    assert few.sigmas == wanted
    assert [state["x"].item() for state in few.states] == wanted
    assert few.rows == 2 * len(wanted)
    assert (few.sides, few.objective) == (2, all_of_them.objective)


def pictures(calib, probes):
    """Which pictures are in probes, by the latents of their rows: a list of batches."""
    known = {
        np.array(calib.latents[step, p]).tobytes(): p for step in range(calib.steps) for p in range(len(calib.prompts))
    }
    return [[known[np.array(row).tobytes()] for row in state["latent"]] for state in probes.states]


@pytest.mark.parametrize("samples", [None, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.0])
def test_pictures_that_are_held_out_are_not_learned_from(cfg, count, samples):
    adapter = Chain(blocks=1, side=4)
    calib = collect(adapter, adapter.prompts("calibration", count), 3, cfg, samples=samples)
    used = {picture for some in calib.pictures for picture in some}
    learned, held = (calib.probes(adapter, held_out=share) for share in (False, True))
    seen, kept = (sorted({picture for batch in pictures(calib, some) for picture in batch}) for some in (learned, held))
    assert seen
    assert kept
    assert set(seen) | set(kept) == used
    assert not set(seen) & set(kept) or len(used) == 1
    assert held.few(1).rows
    for probes in (learned, held):
        assert isinstance(probes.objective, GuidedPrediction)
        assert probes.objective.weight == (cfg if cfg == 2 else 1)
        assert all(len(prompted) <= max(adapter.rows, probes.sides) for prompted in probes.prompted)


def test_rows_of_a_picture_are_side_by_side_first_with_its_prompt():
    adapter = Chain(blocks=1, side=4)
    calib = collect(adapter, adapter.prompts("calibration", 5), 2, 2.0)
    probes = calib.probes(adapter)
    for state, prompted, batch in zip(probes.states, probes.prompted, pictures(calib, probes), strict=True):
        assert batch == [picture for picture in dict.fromkeys(batch) for _ in range(2)]
        assert prompted == (True, False) * (len(batch) // 2)
        tokens = np.array(state["tokens"])
        empty = np.array(adapter.encode([""])["tokens"])[0]
        assert [bool((row != empty).any()) for row in tokens] == list(prompted)
    assert probes.sides == 2


@pytest.mark.parametrize(("cfg", "prompted"), [(0.0, False), (1.0, True)])
def test_one_side_is_asked_for_alone(cfg, prompted):
    adapter = Chain(blocks=1, side=4)
    probes = collect(adapter, adapter.prompts("calibration", 3), 2, cfg).probes(adapter)
    assert probes.sides == 1
    assert {side for batch in probes.prompted for side in batch} == {prompted}


def test_windows_that_are_held_out_are_not_learned_from(tmp_path):
    adapter = mq.load(gpt_folder(tmp_path)).adapter
    windows = np.random.default_rng(0).integers(0, 256, (11, 8), dtype=np.int32)
    calib = TextCalibration("gpt", "", windows, {})
    parts = []
    for held_out in (False, True):
        probes = calib.probes(adapter, held_out)
        assert isinstance(probes.objective, NextToken)
        assert [len(state["tokens"]) for state in probes.states] == [len(batch) for batch in probes.prompted]
        parts.append(np.concatenate([np.array(state["tokens"]) for state in probes.states]))
    np.testing.assert_array_equal(parts[0], windows[shares(11)[0]])
    np.testing.assert_array_equal(parts[1], windows[shares(11)[1]])


def test_recorded_calls_that_are_held_out_are_not_learned_from():
    module = anybody.seeded(anybody.Plain)
    calls = [((mx.random.normal((2, 4, 6), key=mx.random.key(seed)),), {}) for seed in range(3)]
    host = RecordedAdapter(recorded(module, *calls))
    learned, held = (RecordedCalibration(host).probes(host, share) for share in (False, True))
    assert (len(learned.states), len(held.states)) == (2, 1)
    assert isinstance(learned.objective, EveryNumber)
    assert [[state[CALL].item() for state in some.states] for some in (learned, held)] == [[0, 1], [2]]
    assert all(prompted == (True,) for some in (learned, held) for prompted in some.prompted)
