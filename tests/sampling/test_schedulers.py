"""Schedulers: a perfect model's picture comes out, levels mean the same everywhere, gains are slopes."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.grids.time import log_snr
from mlxquant.sampling.parameterizations import KINDS, Parameterization
from mlxquant.sampling.pndm import PNDM
from mlxquant.sampling.schedulers import DDIM, DPMSolver, Euler, EulerAncestral, FlowEuler
from mlxquant.sampling.schedules import Training, flow_sigmas, noise_level, resampled

SD = Training(first=0.00085, last=0.012, schedule="scaled_linear")
SHAPE = (2, 4, 4, 3)

SCHEDULERS = {
    "flow": FlowEuler(),
    "flow shifted": FlowEuler(3.0),
    "flow karras": FlowEuler(3.0, grid="karras"),
    "euler": Euler(SD),
    "euler leading": Euler(SD, "leading", 1),
    "euler karras": Euler(SD, grid="karras"),
    "ancestral": EulerAncestral(SD, "trailing"),
    "ddim": DDIM(SD),
    "ddim trailing": DDIM(SD, "trailing"),
    "ddim random": DDIM(SD, eta=0.7),
    "ddim cosine": DDIM(Training(schedule="squaredcos_cap_v2")),
    "pndm": PNDM(SD, to_zero=True),
    "dpm": DPMSolver(SD),
    "dpm heun": DPMSolver(SD, heun=True),
    "dpm first": DPMSolver(SD, order=1),
    "dpm karras": DPMSolver(SD, grid="karras"),
    "dpm random": DPMSolver(SD, random=True),
    "dpm flow": DPMSolver(flow_shift=3.0),
    "dpm cosine": DPMSolver(Training(schedule="squaredcos_cap_v2"), least_log=-5.1),
}
CASES = [(name, kind) for name in SCHEDULERS for kind in KINDS if not (kind == "epsilon" and name.startswith("flow"))]
PLAIN = [name for name, one in SCHEDULERS.items() if not (one.walk(4).fresh.any() or one == SCHEDULERS["ddim random"])]


def drawn(scheduler, steps, image, kind, rng, latent=None):
    """What a perfect model of one picture draws, all in float64. Returns the latent and what was read at each step."""
    walk, one, predictions, read = scheduler.walk(steps), Parameterization(kind), [], []
    latent = rng.standard_normal(image.shape) * walk.start if latent is None else latent
    for index in range(len(walk)):
        alpha, sigma = float(walk.alphas[index]), float(walk.sigmas[index])
        shown = walk.read(index, latent)
        read.append(shown)
        output = one.target(image, (shown - alpha * image) / sigma, alpha, sigma)
        now = one.convert(output, shown, alpha, sigma, walk.kind)
        predictions = [now, *predictions[: walk.memory]]
        latent = walk.step(index, latent, predictions, rng.standard_normal(image.shape))
    return latent, read


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("steps", [4, 20])
def test_a_perfect_model_of_one_picture_draws_it(name, kind, steps):
    image = np.random.default_rng(1).standard_normal(SHAPE)
    found, _ = drawn(SCHEDULERS[name], steps, image, kind, np.random.default_rng(2))
    np.testing.assert_allclose(found, image, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (name, steps)
        for name in SCHEDULERS
        for steps in (4, 15, 50)
        if steps != 15 or not name.startswith("ddim")  # whose steps end beside the next timestep where T is no multiple
    ],
)
def test_what_the_model_reads_is_as_noisy_as_the_walk_says(name, steps):
    """Also between the ends: of a picture of zeros what is read has the standard deviation that the level says, even
    where steps add noise."""
    scheduler = SCHEDULERS[name]
    walk = scheduler.walk(steps)
    _, read = drawn(scheduler, steps, np.zeros((1, 50, 50, 8)), "sample", np.random.default_rng(3))
    start = walk.start * walk.scales[0] / walk.sigmas[0]  # a walk that begins below pure noise is given some too much
    if not walk.fresh.any():
        found = np.array([shown.std() for shown in read])
        np.testing.assert_allclose(found, start * walk.sigmas[:-1], rtol=0.02)
    else:
        np.testing.assert_allclose(read[-1].std(), walk.sigmas[-2], rtol=0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_levels_fall_within_zero_and_one_and_give_the_log_snr(name, steps):
    walk = SCHEDULERS[name].walk(steps)
    levels = walk.levels
    assert levels[0] <= 1
    assert levels[-1] >= 0
    assert (np.diff(levels) <= 0).all()
    asked_again = [1] if name == "pndm" and steps > 1 else []
    assert (np.delete(np.diff(levels[:-1]), asked_again) < 0).all()
    inner = (walk.alphas > 0.01) & (walk.sigmas > 0.01)
    np.testing.assert_allclose(log_snr(levels[inner]), 2 * np.log(walk.alphas[inner] / walk.sigmas[inner]), atol=1e-9)


def test_flow_levels_are_the_sigmas_bit_for_bit():
    for steps, shift in [(1, 1.0), (4, 3.0), (28, 3.0), (50, 1.0), (37, 1.7)]:
        walk = FlowEuler(shift).walk(steps)
        np.testing.assert_array_equal(walk.levels, flow_sigmas(steps, shift))
        assert (walk.carry == 1).all()
        np.testing.assert_array_equal(walk.now, np.diff(flow_sigmas(steps, shift)))
        np.testing.assert_array_equal(walk.gains(Parameterization()), -np.diff(flow_sigmas(steps, shift)))


def test_a_level_means_the_same_in_all_families():
    """Latents of equal log-SNR have one level, however they are scaled."""
    ratio = np.array([0.01, 0.5, 1, 14.6, 500])  # noise per image
    flow = noise_level(1 / (1 + ratio), ratio / (1 + ratio))
    preserving = noise_level(1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2))
    exploding = noise_level(np.ones(5), ratio)
    np.testing.assert_allclose(flow, preserving, rtol=1e-12)
    np.testing.assert_allclose(flow, exploding, rtol=1e-12)
    np.testing.assert_allclose(flow, ratio / (1 + ratio), rtol=1e-12)


@pytest.mark.parametrize("name", ["euler", "euler leading", "ddim", "ddim trailing", "dpm"])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_a_level_tells_the_timestep_that_it_was_taken_at(name, steps):
    scheduler = SCHEDULERS[name]
    levels = scheduler.walk(steps).levels[:-1]
    expected = {
        "euler": np.linspace(999, 0, steps),
        "euler leading": 1 + np.arange(steps)[::-1] * (1000 // steps),
        "ddim": np.arange(steps)[::-1] * (1000 // steps),
        "ddim trailing": 1000 - np.arange(steps) * (1000 // steps) - 1,
        "dpm": np.linspace(999, 0, steps + 1).round()[:-1],
    }[name]
    np.testing.assert_allclose(scheduler.time(levels), expected, atol=1e-3)
    np.testing.assert_allclose(scheduler.time(levels.astype(np.float32)), expected, atol=1e-2)
    assert scheduler.time(float(levels[0])).dtype == np.float32
    if name != "euler":
        assert scheduler.time(levels).tolist() == pytest.approx(
            expected.tolist(), abs=1e-6 if "euler" not in name else 1e-3
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_timestep_tells_its_level(name):
    """Those of a walk, but for timesteps that are rounded."""
    scheduler = SCHEDULERS[name]
    levels = scheduler.walk(20).levels[:-1]
    rounded = name in ("dpm karras", "dpm flow")
    np.testing.assert_allclose(scheduler.level(scheduler.time(levels)), levels, atol=2e-3 if rounded else 1e-6)
    assert scheduler.level(float(scheduler.time(levels[3]))) == pytest.approx(levels[3], abs=2e-3)


def test_flow_time_is_told_as_ever():
    levels = flow_sigmas(28, 3.0)
    np.testing.assert_array_equal(FlowEuler(3.0).time(levels), np.float32(1000) * levels.astype(np.float32))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gains_are_how_far_an_error_moves_what_is_read_next(name, kind):
    """Against a difference: the same error in this prediction and in the one before it moves the next latent."""
    scheduler = SCHEDULERS[name]
    walk, one, rng = scheduler.walk(6), Parameterization(kind), np.random.default_rng(4)
    latent, fresh, outputs = *(rng.standard_normal((2, *SHAPE))), rng.standard_normal((1 + walk.memory, *SHAPE))

    def read_next(index, error):
        alpha, sigma = float(walk.alphas[index]), float(walk.sigmas[index])
        made = [one.convert(output + error, latent, alpha, sigma, walk.kind) for output in outputs]
        return walk.step(index, latent, made, fresh) * walk.scales[index + 1]

    for index, gain in enumerate(walk.gains(one)):
        moved = np.abs(read_next(index, 1.0) - read_next(index, 0.0))
        np.testing.assert_allclose(moved, gain, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_of_one_path_have_the_same_gains(kind):
    """Euler's latents explode and DDIM's do not; they are the same sampler, and so is DPM-Solver++ of order 1. That of
    order 2 gives the newest prediction more, and takes it back at the next step."""
    one, ddim = Parameterization(kind), DDIM(SD, "trailing")
    walks = [Euler(SD, "trailing"), DPMSolver(SD, "trailing", order=1), DPMSolver(SD, "trailing")]
    for other in walks:
        np.testing.assert_allclose(other.walk(20).gains(one), ddim.walk(20).gains(one), rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_one_walk_of_many_steps_is_near_two_of_half_as_many(name):
    """Schedulers converge: of a model that is not linear in its latent."""
    scheduler = SCHEDULERS[name]

    def ends(steps):
        walk, rng, predictions = scheduler.walk(steps), np.random.default_rng(5), []
        latent = rng.standard_normal(SHAPE) * walk.start
        for index in range(len(walk)):
            alpha, sigma = float(walk.alphas[index]), float(walk.sigmas[index])
            shown = walk.read(index, latent)
            image = np.tanh(3 * shown * alpha / (alpha**2 + sigma**2))
            now = Parameterization("sample").convert(image, shown, alpha, sigma, walk.kind)
            predictions = [now, *predictions[: walk.memory]]
            latent = walk.step(index, latent, predictions)
        return latent

    coarse, fine, finest = ends(10), ends(40), ends(250)
    assert np.abs(fine - finest).mean() < 0.5 * np.abs(coarse - finest).mean()


def test_second_order_is_nearer_than_first():
    image = np.tanh

    def ends(scheduler, steps):
        walk, predictions = scheduler.walk(steps), []
        latent = np.random.default_rng(6).standard_normal(SHAPE)
        for index in range(len(walk)):
            predictions = [image(latent * walk.alphas[index]), *predictions[: walk.memory]]
            latent = walk.step(index, latent, predictions)
        return latent

    exact = ends(DPMSolver(SD, grid="karras"), 900)
    first, second = (np.abs(ends(DPMSolver(SD, grid="karras", order=n), 20) - exact).mean() for n in (1, 2))
    assert second < first / 2


def test_pndm_asks_twice_where_its_first_step_ends():
    """The second prediction corrects that step alone; later ones remember at most three others."""
    walk = PNDM(SD, offset=1).walk(5)
    np.testing.assert_allclose(PNDM(SD).time(walk.levels[:-1]), [801, 601, 601, 401, 201, 1])
    assert walk.memory == 4
    assert (walk.before != 0).tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [False, True, False, False],
        [True, False, True, False],
        [True, True, False, True],
        [True, True, True, False],
    ]
    assert walk.levels[-1] == pytest.approx(SD.levels[0])
    assert len(PNDM(SD).walk(1)) == 1


def test_an_error_at_a_level_that_is_asked_twice_costs_what_both_do():
    walk, one = PNDM(SD).walk(10), Parameterization("epsilon")
    gains = walk.gains(one)
    assert gains[1] == pytest.approx(0, abs=1e-12)  # an error that both predictions have is corrected by none
    merged = np.delete(gains, 1)
    np.testing.assert_allclose(
        walk.weights(one, np.delete(walk.levels[:-1], 1)), merged**2 / np.mean(merged**2), rtol=1e-9
    )


def test_an_image_is_clipped_and_the_noise_is_not():
    walk = DDIM(SD, clip=0.5).walk(10)
    latent, image = mx.array([[2.0]]), mx.array([[3.0]])
    alpha, sigma = walk.alphas[4], walk.sigmas[4]
    noise = (2.0 - alpha * 3.0) / sigma
    expected = walk.alphas[5] * 0.5 + walk.sigmas[5] * noise
    assert walk.step(4, latent, [image]).item() == pytest.approx(expected, rel=1e-5)
    plain = DDIM(SD).walk(10)
    assert plain.step(4, latent, [mx.array([[0.4]])]).item() == pytest.approx(
        walk.step(4, latent, [mx.array([[0.4]])]).item(), rel=1e-5
    )


def test_a_schedule_may_end_in_noise_alone():
    training = replace(SD, zero_snr=True)
    assert (training.alpha_bars[0], training.alpha_bars[-1]) == (pytest.approx(SD.alpha_bars[0], rel=1e-6), 0)
    walk = DDIM(training, "trailing").walk(10)
    assert walk.levels[0] == 1
    assert DDIM(training, "trailing").time(1.0) == 999
    image = np.random.default_rng(7).standard_normal(SHAPE)
    for kind in ("v", "sample", "flow"):
        found, _ = drawn(DDIM(training, "trailing"), 10, image, kind, np.random.default_rng(8))
        np.testing.assert_allclose(found, image, atol=1e-8)
    with pytest.raises(AdapterError, match="predicts 'epsilon' says nothing new"):
        drawn(DDIM(training, "trailing"), 10, image, "epsilon", np.random.default_rng(8))
    assert DPMSolver(training, "trailing").walk(10).levels[0] == pytest.approx(1, abs=1e-3)


def test_eulers_walks_begin_with_the_noise_of_their_first_level():
    """As loud as an image beside it where they begin below the last timestep, as in diffusers."""
    for spacing, image in (("linspace", 0), ("trailing", 0), ("leading", 1)):
        scheduler = Euler(SD, spacing)
        assert scheduler.walk(10).start == pytest.approx(np.hypot(scheduler.sigmas(10)[0], image))


def test_karras_grid_is_even_in_seventh_roots_and_the_other_in_logarithms():
    own = np.array([80.0, 3.0, 0.5])
    for steps in (3, 8):
        np.testing.assert_allclose(np.diff(resampled(own, "karras", steps) ** (1 / 7), n=2), 0, atol=1e-12)
        np.testing.assert_allclose(np.diff(np.log(resampled(own, "exponential", steps)), n=2), 0, atol=1e-12)
        for grid in ("karras", "exponential"):
            assert resampled(own, grid, steps)[[0, -1]] == pytest.approx([80, 0.5])
            assert resampled(own, grid, steps, 0.1, 9.0)[[0, -1]] == pytest.approx([9, 0.1])


def test_no_noise_for_a_step_that_adds_some_is_an_error():
    walk = EulerAncestral(SD).walk(4)
    with pytest.raises(AdapterError, match="step 0 of this sampler adds noise"):
        walk.step(0, mx.zeros((1,)), [mx.zeros((1,))])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_steps_are_refused(name):
    with pytest.raises(AdapterError, match="at least 1, found 0"):
        SCHEDULERS[name].walk(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(SD).walk(1001), "1001 steps of a model that was trained at 1000"),
        (lambda: DDIM(SD, offset=25).walk(50), "timestep 1005 of a model that was trained at 1000"),
        (lambda: Training(schedule="sigmoid"), "'sigmoid'; expected one of linear"),
        (lambda: Training(first=0.0), "betas must be between 0 and 1"),
        (lambda: Training(betas=()), "betas must be between 0 and 1"),
        (lambda: PNDM(SD, offset=25).walk(50), "timestep 1005 of a model that was trained at 1000"),
        (lambda: PNDM(kind="sample"), "of kind 'sample'; expected 'epsilon' or 'v'"),
        (lambda: DPMSolver(order=3), "order 3; expected 1 or 2"),
    ],
)
def test_what_cannot_be_walked_is_refused(make, message):
    with pytest.raises(AdapterError, match=message):
        make()


def test_betas_that_are_given_are_those():
    betas = np.linspace(SD.first**0.5, SD.last**0.5, 1000).astype(np.float32) ** 2
    np.testing.assert_array_equal(Training(betas=tuple(betas.tolist())).alpha_bars, SD.alpha_bars)
    assert len(Training(betas=(0.1, 0.2))) == 2
    np.testing.assert_allclose(Training(betas=(0.1, 0.2)).alpha_bars, [0.9, 0.72], rtol=1e-6)
