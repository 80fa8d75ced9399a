"""A model that preserves variance and is no flow: sampled, calibrated, quantized over time, weighed by its steps."""

import mlxquant as mq

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.passes import Passes
from mlxquant.calibration.trajectories import Calibration, collect
from mlxquant.curvature.sensitivity import measure
from mlxquant.errors import AdapterError
from mlxquant.grids.time import log_snr
from mlxquant.sampling.parameterizations import Parameterization
from mlxquant.sampling.pndm import PNDM
from mlxquant.sampling.schedulers import DDIM, DPMSolver, Euler, EulerAncestral, FlowEuler
from mlxquant.sampling.schedules import Training

from support.other_host import Host
from support.tiny_pictures import tiny_adapter

SD = Training(first=0.00085, last=0.012, schedule="scaled_linear")
PROMPT = mq.Prompt(1, "a large red circle at left on white background")
STEPS = 4


def preserving(scheduler=None, kind="epsilon"):
    adapter = tiny_adapter()
    adapter.scheduler, adapter.parameterization = scheduler or DDIM(SD, "trailing"), Parameterization(kind)
    return adapter


class Variance(Host):
    """Half of what it writes is a variance; ``loud`` is what that half is multiplied with."""

    def __init__(self, loud=1.0, packed=False):
        super().__init__(packed=packed)
        self.parameterization, self.loud = Parameterization("epsilon", learned_variance=True), loud

    def _head(self, state):
        (written,) = super()._head(state).values()
        wide = (
            self.unpack_twice(written) if self.options["packed"] else mx.concatenate([written, self.loud * written], -1)
        )
        return {"epsilon": wide}

    def unpack_twice(self, written):
        h, w, c = self.latent_shape
        once = super().unpack(written, (h, w, c))
        both = mx.concatenate([once, self.loud * once], -1)
        return both.reshape(-1, h // 2, 2, w // 2, 2, 2 * c).transpose(0, 1, 3, 2, 4, 5).reshape(len(both), -1, 8 * c)

    def unpack(self, predicted, shape):
        h, w, c = shape
        return super().unpack(predicted, (h, w, 2 * c)) if self.options["packed"] else predicted


def test_flows_are_sampled_as_ever():
    adapter = tiny_adapter()
    assert adapter.scheduler == FlowEuler(adapter.shift)
    assert adapter.parameterization == Parameterization("flow")
    assert adapter.sampler is None
    seen = []
    adapter.generate([PROMPT.text], [1], STEPS, callback=seen.append)
    text, latent = adapter.encode([PROMPT.text]), None
    for step, (sigma, following) in zip(
        seen, np.stack([adapter.sigmas(STEPS)[:-1], adapter.sigmas(STEPS)[1:]], 1), strict=True
    ):
        latent = step.latent if latent is None else latent
        np.testing.assert_array_equal(np.array(step.latent), np.array(latent))
        state = adapter.state(latent, text, sigma)
        assert state["t"].item() == np.float32(1000) * np.float32(sigma)
        latent = latent + step.velocity * float(following - sigma)


def test_a_level_that_is_asked_twice_is_calibrated_once():
    """PNDM takes its first step again. What is kept of that level is what the trajectory goes on from."""
    adapter, seen = preserving(PNDM(SD)), []
    assert len(adapter.walk(STEPS)) == STEPS + 1
    assert adapter.sigmas(STEPS).shape == (STEPS + 1,)
    assert (np.diff(adapter.sigmas(STEPS)) < 0).sum() >= STEPS - 1
    calib = collect(adapter, [PROMPT], STEPS, 2.0)
    adapter.generate([PROMPT.text], [PROMPT.seed], STEPS, 2.0, callback=seen.append)
    assert [step.sigma for step in seen] == adapter.walk(STEPS).levels[:-1].tolist()
    kept = [seen[index] for index in (0, 2, 3, 4)]
    np.testing.assert_array_equal(calib.sigmas, [step.sigma for step in kept])
    np.testing.assert_array_equal(np.array(calib.latents[:, 0]), np.array([step.latent[0] for step in kept]))
    assert not mx.array_equal(seen[1].latent, seen[2].latent)
    assert mq.quantize(mq.Model(adapter), calib, "rtn-w4a8").images([PROMPT], STEPS, 2.0).shape[0] == 1


@pytest.mark.parametrize(
    "scheduler",
    [DDIM(SD, "leading", 1), PNDM(SD, "leading", 1), Euler(SD), DPMSolver(SD), EulerAncestral(SD, "trailing")],
    ids=lambda s: type(s).__name__,
)
def test_the_model_is_told_its_timesteps_and_reads_unit_variance(scheduler, monkeypatch):
    adapter, told, seen = preserving(scheduler), [], []
    state = adapter.state
    monkeypatch.setattr(adapter, "state", lambda *a: told.append(made := state(*a)) or made)
    final = adapter.generate([PROMPT.text] * 2, [1, 2], STEPS, 1.0, seen.append)
    assert np.isfinite(np.array(final)).all()
    expected = {
        "DDIM": [751, 501, 251, 1],
        "PNDM": [751, 501, 501, 251, 1],
        "Euler": [999, 666, 333, 0],
        "DPMSolver": [999, 749, 500, 250],
        "EulerAncestral": [999, 749, 499, 249],
    }[type(scheduler).__name__]
    np.testing.assert_allclose([made["t"][0].item() for made in told], expected, atol=1e-2)
    np.testing.assert_allclose([step.sigma for step in seen], adapter.walk(STEPS).levels[:-1])
    assert 0.9 < float(seen[0].latent.std()) < 1.1


def test_what_steps_add_belongs_to_the_seed():
    adapter = preserving(EulerAncestral(SD, "trailing"))
    together = adapter.generate([PROMPT.text] * 2, [3, 9], STEPS, 1.0)
    again = adapter.generate([PROMPT.text] * 2, [9, 3], STEPS, 1.0)
    np.testing.assert_allclose(np.array(together), np.array(again)[::-1], rtol=2e-4, atol=2e-4)
    plain = preserving(Euler(SD, "trailing")).generate([PROMPT.text] * 2, [3, 9], STEPS, 1.0)
    assert np.abs(np.array(together) - np.array(plain)).mean() > 0.01


@pytest.mark.parametrize("method", ["logsnr-ridge", "tdq-ridge", "grouped", "envelope"])
def test_tables_over_time_are_made_at_the_levels_of_the_schedule(method):
    model = mq.Model(preserving())
    calib = mq.calibrate(model, prompts=1, steps=STEPS)
    levels = model.adapter.sigmas(STEPS)[:-1]
    np.testing.assert_array_equal(calib.sigmas, levels)
    bars = SD.alpha_bars[[999, 749, 499, 249]]
    np.testing.assert_allclose(log_snr(levels), np.log(bars / (1 - bars)), atol=1e-6)
    made = mq.quantize(model, calib, f"rtn+{method}-w8a8")
    tables = [layer.table for layer in made.layers.values() if layer.table is not None]
    assert tables
    for table in tables:
        np.testing.assert_array_equal(table.sigma, levels[::-1].astype(np.float32))
    assert made.adapter.scheduler == model.adapter.scheduler
    exact, drawn = (m.images([PROMPT], steps=STEPS) for m in (model, made))
    assert 0 < np.abs(exact - drawn).mean() < 0.1
    assert np.isfinite(made.images([PROMPT], steps=7)).all()


def test_levels_weigh_by_the_gain_of_their_step_unless_the_model_is_a_flow():
    """The same network, whose output is said to be a velocity or noise."""
    flow, other = tiny_adapter(), preserving(DDIM(SD))
    levels = [float(np.float32(s)) for s in other.sigmas(other.steps)[[3, 12, 25]]]
    np.testing.assert_array_equal(flow.level_weights(levels), 1)
    walk = DDIM(SD).walk(other.steps)
    gains = walk.gains(Parameterization("epsilon"))
    np.testing.assert_allclose(other.level_weights(levels), (gains**2 / np.mean(gains**2))[[3, 12, 25]], rtol=1e-4)
    flow.scheduler = other.scheduler  # and told the same timesteps
    path = "final_layer.linear"
    tables = []
    for adapter in (flow, other):
        text = adapter.encode([PROMPT.text])
        noise = mx.random.normal((1, *adapter.latent_shape), key=mx.random.key(5))
        states = [adapter.state(noise, text, level) for level in levels]
        tables.append(measure(Passes(adapter, levels), adapter.stages, states, [path]).tables)
    for name in tables[0].keys() - {"/sigma"}:
        ascending = other.level_weights(levels)[::-1, None]
        np.testing.assert_allclose(tables[1][name], tables[0][name] * ascending, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_a_learned_variance_is_neither_followed_nor_weighed(packed):
    quiet, loud = Variance(0.0, packed), Variance(100.0, packed)
    for one in (quiet, loud):
        one.scheduler = DDIM(SD, "trailing")
    drawn = [np.array(one.generate(["a tree"], [1])) for one in (quiet, loud)]
    assert drawn[0].shape == (1, *quiet.latent_shape)
    np.testing.assert_array_equal(*drawn)
    found = []
    for one in (quiet, loud):
        noise = mx.random.normal((2, *one.latent_shape), key=mx.random.key(5))
        state = one.state(noise, one.encode(["a tree", "fog"]), 0.5)
        found.append(measure(Passes(one, [0.5]), one.stages, [state], ["blocks.0.fc1", "head"]).layers)
    for path, costs in found[0].items():
        assert costs.max() > 0
        np.testing.assert_array_equal(costs, found[1][path])


def test_trajectories_of_another_sampler_are_other_trajectories(tmp_path):
    adapter = preserving(EulerAncestral(SD, "trailing"))
    made = collect(adapter, [PROMPT], STEPS, 1.0, folder=tmp_path / "kept")
    assert made.sampler == adapter.sampler
    assert "EulerAncestral" in made.facts["sampler"]
    made.save(tmp_path / "calib.safetensors")
    assert Calibration.load(tmp_path / "calib.safetensors").record == made.record
    same = collect(adapter, [PROMPT], STEPS, 1.0, folder=tmp_path / "kept")
    np.testing.assert_array_equal(np.array(same.latents), np.array(made.latents))
    adapter.scheduler = Euler(SD, "trailing")
    other = collect(adapter, [PROMPT], STEPS, 1.0, folder=tmp_path / "kept")
    assert not np.array_equal(np.array(other.latents[1:]), np.array(made.latents[1:]))
    assert "sampler" not in collect(tiny_adapter(), [PROMPT], STEPS, 1.0).facts


def test_a_scheduler_that_takes_other_steps_is_refused():
    adapter = preserving(DPMSolver(SD, "trailing", least_log=0.0))
    with pytest.raises(AdapterError, match=r"its scheduler takes \d+ steps where 20 were asked for"):
        adapter.sigmas(20)


def test_noise_alone_tells_a_model_of_noise_nothing():
    adapter = preserving(DDIM(replace(SD, zero_snr=True), "trailing"))
    with pytest.raises(AdapterError, match="'epsilon' says nothing new of a latent that is 0 image"):
        adapter.generate([PROMPT.text], [1], STEPS)
