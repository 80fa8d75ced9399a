"""Forward passes a stage at a time, and which of equal trials is kept."""

import mlxquant as mq

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.passes import Passes
from mlxquant.errors import AdapterError
from mlxquant.sweep.streams import Deviation, ExactStream, stage_error
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


def states(*batches):
    """One state a batch, [rows,tokens,2] that hold a number each."""
    return [{"image": mx.array(np.float32(batch)[:, None, :].repeat(3, axis=1))} for batch in batches]


def test_a_batchs_errors_cost_what_they_cost_at_its_own_noise_level():
    """Two batches of other sizes: squared errors by channel, by cost, averaged over all rows."""
    targets, outputs = states([[0, 0]], [[0, 0], [0, 0]]), states([[1, 2]], [[3, 0], [0, 1]])
    costs = {"image": np.float64([[10, 1], [100, 7]])}
    expected = ((10 * 1 + 1 * 4) + (100 * 9) + (7 * 1)) / 3
    assert stage_error(outputs, targets, costs) == pytest.approx(expected)
    deviation = Deviation(costs)
    for output, target in zip(outputs, targets, strict=True):
        deviation.add(output, target)
    assert deviation.by_tensor == {"image": pytest.approx(expected)}


def test_without_costs_errors_are_relative_and_tensors_count_alike():
    targets = [
        {"a": mx.full((2, 3, 2), 10.0), "b": mx.full((2, 5), 1.0)},
        {"a": mx.zeros((1, 3, 2)), "b": mx.ones((1, 5))},
    ]
    outputs = [
        {"a": mx.full((2, 3, 2), 11.0), "b": mx.full((2, 5), 1.5)},
        {"a": mx.ones((1, 3, 2)), "b": mx.ones((1, 5))},
    ]
    assert stage_error(outputs, targets) == pytest.approx(np.mean([18 / 1200, 0.25 * 10 / 15]))
    deviation = Deviation()
    for output, target in zip(outputs, targets, strict=True):
        deviation.add(output, target)
    assert deviation.by_tensor == {"a": pytest.approx(1.0), "b": pytest.approx(2.5 / 15)}


class Twice:
    """A stage without a model: it doubles what it reads and writes one tensor more."""

    name = "twice"

    def run(self, state):
        return {"image": 2 * state["image"], "text": state["text"], "sum": state["image"] + state["text"]}


@pytest.mark.parametrize("both", [True, False])
def test_the_teacher_goes_on_from_what_it_wrote_and_tells_what_entered(chain, both):
    text = mx.ones((1, 2))
    first = [{"image": mx.full((1, 2), float(index)), "text": text} for index in range(3)]
    teacher = ExactStream(Passes(chain, [0.2, 0.5, 0.9]), first, both)
    targets = teacher.targets(Twice())
    assert [set(target) for target in targets] == [{"image", "sum"}] * 3  # not what only passed through
    assert [target["image"].tolist() for target in targets] == [[[0, 0]], [[2, 2]], [[4, 4]]]
    assert list(teacher.inputs()) == (first if both else [])
    again = teacher.targets(Twice())
    assert [target["image"].tolist() for target in again] == [[[0, 0]], [[4, 4]], [[8, 8]]]
    entered = [state["image"].tolist() for state in teacher.inputs()]
    assert entered == ([[[0, 0]], [[2, 2]], [[4, 4]]] if both else [])
