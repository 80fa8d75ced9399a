"""Forward passes a stage at a time, and which of equal trials is kept."""

import mlxquant as mq

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sweep.streams import Passes
from mlxquant.sweep.sweep import best_of
from mlxquant.sweep.trial import Trial

from support.synthetic_chain import Chain


@pytest.fixture(scope="module")
def chain():
    return Chain(blocks=2)


@pytest.fixture(scope="module")
def batches(chain):
    return mq.calibrate(mq.Model(chain), prompts=3, steps=2).batches(chain)


def test_stage_after_stage_is_the_model(chain, batches):
    sigmas, states = batches
    passes, found = Passes(chain, sigmas), states
    for stage in chain.stages:
        found = passes.through(stage, found)
    for sigma, state, left in zip(sigmas, states, found, strict=True):
        np.testing.assert_array_equal(np.array(left["velocity"]), np.array(chain.run(state, sigma)["velocity"]))


def test_the_clock_shows_each_batch_its_own_noise_level_and_nothing_afterwards(chain, batches):
    sigmas, states = batches
    labels, passes = [], Passes(chain, sigmas, lambda items, label: (labels.append(label), items)[1])
    for index in passes.indices("here"):
        with passes.at(index):
            assert chain.clock.sigma.tolist() == pytest.approx([sigmas[index]])
    read = [state for state, _ in passes.each(chain.stages[0], states)]
    assert labels == ["here", "embed"]
    assert len(read) == len(passes) == len(sigmas)
    with pytest.raises(AdapterError, match="no timestep"):
        _ = chain.clock.sigma


def test_some_batches_are_counted_anew(chain, batches):
    sigmas, states = batches
    some = Passes(chain, sigmas).some([0, len(sigmas) - 1])
    assert list(some.sigmas) == [sigmas[0], sigmas[-1]]
    found = some.one(chain.stages[0], 1, states[len(sigmas) - 1])
    expected = Passes(chain, sigmas).one(chain.stages[0], len(sigmas) - 1, states[len(sigmas) - 1])
    assert mx.array_equal(found["image"], expected["image"])


def test_of_equal_trials_the_first_is_kept():
    trials = [Trial(name, error=error) for name, error in (("a", 2.0), ("b", 1.0), ("c", 1.0))]
    assert best_of(trials).name == "b"
    assert best_of(trials[::-1]).name == "c"
