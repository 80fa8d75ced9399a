"""The one sampler: exact on straight flows, seeded sample by sample."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sampling.parameterizations import Parameterization
from mlxquant.sampling.pndm import PNDM
from mlxquant.sampling.sampler import sample, seeded_noise
from mlxquant.sampling.schedulers import DDIM, DPMSolver, Euler, EulerAncestral, FlowEuler
from mlxquant.sampling.schedules import flow_sigmas

SHAPE = (4, 4, 2)


def flow_to(target):
    """The exact velocity of a rectified flow whose data is one point: (x - target) / sigma."""
    return lambda x, sigma: (x - target) / sigma


@pytest.mark.parametrize("steps", [1, 3, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_flow_is_integrated_exactly(steps, shift):
    target = mx.full((2, *SHAPE), 0.25)
    latent = sample(flow_to(target), seeded_noise([1, 2], SHAPE), FlowEuler(shift).walk(steps))
    np.testing.assert_allclose(np.array(latent), 0.25, atol=1e-5)


def test_callback_sees_every_step_before_it_is_taken():
    seen = []
    noise = seeded_noise([0, 1], SHAPE)
    sample(flow_to(mx.zeros((2, *SHAPE))), noise, FlowEuler().walk(5), callback=seen.append)
    assert [s.index for s in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(np.array(seen[0].latent), np.array(noise))
    np.testing.assert_allclose([s.sigma for s in seen], flow_sigmas(5)[:-1])


def test_noise_belongs_to_the_seed_not_to_the_batch():
    together, alone = seeded_noise([3, 9], SHAPE), seeded_noise([9], SHAPE)
    np.testing.assert_array_equal(np.array(together[1:]), np.array(alone))
    assert not np.array_equal(np.array(together[0]), np.array(together[1]))


def test_noise_is_diffusionkits():
    expected = np.random.RandomState(7).randn(1, 2, 4, 4).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.array(seeded_noise([7], SHAPE)), expected, rtol=1e-6)


def test_every_step_adds_noise_of_its_own():
    """Where the model sees no noise at all, what changes from step to step is what was added."""
    walk, seen = EulerAncestral().walk(5), []
    noise = seeded_noise([4], (40, 40, 3))
    last = sample(lambda x, level: mx.zeros_like(x), noise, walk, Parameterization("epsilon"), seen.append, [4])
    latents = [np.array(step.latent) / walk.scales[step.index] for step in seen] + [np.array(last)]
    added = [
        np.diff(pair, axis=0)[0].ravel() / up for pair, up in zip(pairwise(latents), walk.fresh, strict=True) if up
    ]
    assert len(added) == 4  # and the last step none
    np.testing.assert_allclose(latents[-1], latents[-2], rtol=1e-5)
    np.testing.assert_allclose(np.cov([np.array(noise).ravel(), *added]), np.eye(5), atol=0.06)
    with pytest.raises(AdapterError, match="adds noise, and was given none"):
        sample(lambda x, level: x, noise, walk, Parameterization("epsilon"))


@pytest.mark.parametrize("scheduler", [Euler(), EulerAncestral(), DDIM(eta=0.5), DPMSolver(), DPMSolver(random=True)])
@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_a_perfect_model_draws_its_picture_with_any_scheduler(scheduler, kind):
    walk, one, image = scheduler.walk(12), Parameterization(kind), mx.full((2, *SHAPE), 0.25)
    mixed = {float(level): pair for level, *pair in zip(walk.levels, walk.alphas, walk.sigmas, strict=True)}

    def predict(x, level):
        alpha, sigma = map(float, mixed[level])
        return one.target(image, (x - alpha * image) / sigma, alpha, sigma)

    latent = sample(predict, seeded_noise([1, 2], SHAPE), walk, one, seeds=[1, 2])
    np.testing.assert_allclose(np.array(latent), 0.25, atol=1e-3)


SCHEDULERS = (
    FlowEuler(3.0),
    Euler(),
    DDIM(),
    DDIM(clip=4.0),
    PNDM(to_zero=True),
    DPMSolver(),
    DPMSolver(order=1),
    DPMSolver(heun=True),
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("first", [0, 5, 11])
def test_from_an_image_a_walk_takes_its_last_steps(scheduler, first):
    """A model that sees image and noise for what they are is shown that image with that noise at the level of the first
    step, and draws its own picture.
    """
    whole, shown = scheduler.walk(12), []
    kind = whole.kind if whole.kind == "flow" else "epsilon"
    walk, one, picture = whole.since(first), Parameterization(kind), mx.full((2, *SHAPE), 0.25)
    assert len(walk) == len(whole) - first
    np.testing.assert_array_equal(walk.levels, whole.levels[first:])
    mixed = {float(level): pair for level, *pair in zip(walk.levels, walk.alphas, walk.sigmas, strict=True)}

    def predict(x, level):
        alpha, sigma = map(float, mixed[level])
        return one.target(picture, (x - alpha * picture) / sigma, alpha, sigma)

    image, noise = mx.full((2, *SHAPE), -0.5), seeded_noise([1, 2], SHAPE)
    latent = sample(predict, noise, walk, one, shown.append, [1, 2], image)
    expected = whole.alphas[first] * np.array(image) + whole.sigmas[first] * np.array(noise)
    np.testing.assert_allclose(np.array(shown[0].latent), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(latent), 0.25, atol=1e-3)


@pytest.mark.parametrize("scheduler", [DPMSolver(), DPMSolver(heun=True)])
def test_a_first_step_without_history_is_of_order_one(scheduler):
    late, first_order = scheduler.walk(12).since(5), DPMSolver(order=1).walk(12)
    assert not late.before[0].any()
    np.testing.assert_allclose(late.now[0], first_order.now[5], rtol=1e-10)
    np.testing.assert_allclose(late.now[1:], scheduler.walk(12).now[6:])
    np.testing.assert_array_equal(late.before[1:], scheduler.walk(12).before[6:])


def test_a_walk_from_a_later_step_on_remembers_no_step_that_was_not_taken():
    whole = PNDM().walk(12)
    late = whole.since(5)
    for index in range(len(late)):
        assert not late.before[index, index:].any()
        np.testing.assert_array_equal(late.before[index, :index], whole.before[5 + index, :index])
    np.testing.assert_allclose(late.now + late.before.sum(1), (whole.now + whole.before.sum(1))[5:])
    np.testing.assert_array_equal(late.now[4:], whole.now[9:])
