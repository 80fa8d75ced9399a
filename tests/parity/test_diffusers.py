"""Schedulers against diffusers': the same predictions give the same latents, step by step.

Needs ``pip install 'mlxquant[diffusers]'``, after a CPU build of torch. Trajectories are compared in float64, where
nothing is lost to rounding, and in float32, as models run.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.sampling.parameterizations import Parameterization
from mlxquant.sampling.scheduler_config import parameterization_from_config, scheduler_from_config
from mlxquant.sampling.schedules import Training

from support.scheduler_configs import CONFIGS

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch's tensors in NumPy 2
]

SHAPE = (1, 8, 8, 4)
STEPS = (4, 7, 15, 20, 50)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = {
    "linear": {},
    "scaled_linear": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {**SD, "rescale_betas_zero_snr": True},
}
SPACINGS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}
KINDS = {  # by name: a configuration without betas, spacing and prediction
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "euler sigma_min": {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"},
    "ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "ddim last": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "pndm": PNDM,
    "pndm to one": {**PNDM, "set_alpha_to_one": True},
    "dpm": DPM,
    "dpm heun": {**DPM, "solver_type": "heun"},
    "dpm first": {**DPM, "solver_order": 1},
    "dpm sigma_min": {**DPM, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    "dpm euler": {**DPM, "final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
    "dpm random": {**DPM, "algorithm_type": "sde-dpmsolver++"},
    "dpm random heun": {**DPM, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    "dpm clipped": {**DPM, "lambda_min_clipped": -2.1},
}
GRIDS = {
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "flow shifted": CONFIGS["sd3"],
    "flow karras": {**CONFIGS["sd3"], "use_karras_sigmas": True},
    "flow exponential": {**CONFIGS["sd3"], "use_exponential_sigmas": True},
    "flow trained": {**CONFIGS["sd3"], "num_train_timesteps": 500},
    "euler karras": {**KINDS["euler"], **SD, "use_karras_sigmas": True},
    "euler karras ends": {**KINDS["euler"], **SD, "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
    "euler exponential": {**KINDS["euler"], **SD, "use_exponential_sigmas": True},
    "dpm karras": {**DPM, **SD, "use_karras_sigmas": True},
    "dpm karras heun": {**DPM, **SD, "use_karras_sigmas": True, "solver_type": "heun"},
    "dpm karras sigma_min": {**DPM, **SD, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    "dpm exponential": {**DPM, **SD, "use_exponential_sigmas": True},
    "dpm cosine karras": {**DPM, **BETAS["cosine"], "use_karras_sigmas": True},
    "sana": CONFIGS["sana"],
    "sana heun": {**CONFIGS["sana"], "solver_type": "heun"},
}
ETA = 0.6


def theirs(config):
    """A scheduler of diffusers."""
    return getattr(import_module("diffusers"), config["_class_name"]).from_config(dict(config))


class Wide:
    """torch, whose float32 is float64."""

    def __getattr__(self, name):
        return getattr(import_module("torch"), "float64" if name == "float32" else name)


def widen(scheduler):
    """Its tables in float64, of which the values stay."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


class Ours:
    """A trajectory of ours, in float32 of MLX or in float64 of NumPy."""

    def __init__(self, scheduler, kind, steps, noise, wide):
        self.walk, self._one = scheduler.walk(steps), Parameterization(kind)
        self._put = partial(np.asarray, dtype=np.float64) if wide else mx.array
        self.latent, self._predictions = self._put(noise) * self.walk.start, []

    def step(self, index, output, fresh):
        """What was read, and the latent after it."""
        shown = self.walk.read(index, self.latent)
        levels = float(self.walk.alphas[index]), float(self.walk.sigmas[index])
        now = self._one.convert(self._put(output), shown, *levels, self.walk.kind)
        self._predictions = [now, *self._predictions[: self.walk.memory]]
        self.latent = self.walk.step(index, self.latent, self._predictions, self._put(fresh))
        return np.array(shown), np.array(self.latent)


def differences(other, ours, kind, steps, dtype, monkeypatch):
    """Of a whole trajectory, with the same predictions and the same noise: timesteps, and the largest relative
    differences of what the model reads and of latents. What is predicted are images that depend on the latent.

    Returns:
        Theirs to ours in float64 and ours in float32 to it, and the differences of timesteps [steps].
    """
    torch, rng, module = import_module("torch"), np.random.default_rng(steps), sys.modules[type(other).__module__]
    other.set_timesteps(steps)
    if hasattr(other, "set_begin_index"):
        other.set_begin_index(0)  # it would look the first timestep up, and may find two
    if dtype is np.float64:
        widen(other)
        monkeypatch.setattr(module, "torch", Wide())
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    exact, single = (Ours(ours, kind, steps, noise, wide) for wide in (True, False))
    walk, start = exact.walk, float(getattr(other, "init_noise_sigma", 1.0))
    assert len(walk) == len(other.timesteps)
    assert walk.start == pytest.approx(start, rel=1e-6)
    latent, far = torch.from_numpy(noise.astype(dtype)) * start, [0.0, 0.0]
    for index, time in enumerate(other.timesteps):
        alpha, sigma = float(walk.alphas[index]), float(walk.sigmas[index])
        scaled = other.scale_model_input(latent, time) if hasattr(other, "scale_model_input") else latent
        image = np.tanh(3 * scaled.numpy()) + 0.1 * rng.standard_normal(SHAPE)
        output = Parameterization(kind).target(image, (scaled.numpy() - alpha * image) / sigma, alpha, sigma)
        output, fresh = output.astype(np.float32), rng.standard_normal(SHAPE).astype(np.float32)
        drawn = torch.from_numpy(fresh.astype(dtype))
        monkeypatch.setattr(module, "randn_tensor", lambda *_, drawn=drawn, **__: drawn, raising=False)
        random = {"eta": ours.eta} if getattr(ours, "eta", 0) else {}
        latent = other.step(torch.from_numpy(output.astype(dtype)), time, latent, return_dict=False, **random)[0]
        reference = exact.step(index, output, fresh)
        for place, found in enumerate([(scaled.numpy(), latent.numpy()), single.step(index, output, fresh)]):
            for a, b in zip(found, reference, strict=True):
                far[place] = max(far[place], float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    told = np.abs(ours.time(walk.levels[:-1]) - other.timesteps.numpy().astype(np.float64))
    return *far, told


def exact(config):
    """Ours with their tables, whose last bits are the machine's."""
    ours, other = scheduler_from_config(config), theirs(config)
    if hasattr(ours, "training"):
        bars = other.alphas_cumprod
        vars(ours.training)["alpha_bars"] = bars.numpy().astype(np.float64)
        vars(ours.training)["sigmas"] = (((1 - bars) / bars) ** 0.5).numpy().astype(np.float64)
    return ours


@pytest.mark.parametrize(("name", "betas"), list(product(KINDS, BETAS)))
def test_trajectories_in_float64(name, betas, monkeypatch):
    for turn, (prediction, spacing) in enumerate(product(PREDICTIONS, SPACINGS)):
        config = {**KINDS[name], **BETAS[betas], **SPACINGS[spacing], "prediction_type": prediction}
        if unknown_there(name, betas, prediction):
            continue
        steps, kind = STEPS[turn % len(STEPS)], parameterization_from_config(config).kind
        with monkeypatch.context() as patch:
            found, _, told = differences(theirs(config), exact(config), kind, steps, np.float64, patch)
        assert found < 1e-7, (config, steps)
        assert told.max() < 1e-3, (config, steps)


def unknown_there(name, betas, prediction):
    """What diffusers does not do, or does by dividing by zero."""
    return (name.split()[0] in ("ancestral", "pndm") and prediction == "sample") or (
        name.startswith("ddim") and betas == "zero snr" and prediction == "epsilon"
    )


@pytest.mark.parametrize("name", GRIDS)
def test_grids_in_float64(name, monkeypatch):
    config = GRIDS[name]
    kind = parameterization_from_config(config).kind
    for steps in STEPS:
        with monkeypatch.context() as patch:
            found, _, told = differences(theirs(config), exact(config), kind, steps, np.float64, patch)
        assert found < 1e-6, steps
        # where a grid begins at the last timestep but for rounding, theirs may be the one below
        assert told[1:].max() < 1e-3, (steps, told)
        assert told[0] < 1e-3 or (told[0] == 1 and name in ("dpm exponential", "dpm cosine karras")), (steps, told)


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"pixels"}))  # whose images are clipped by MLX alone
def test_public_configurations_in_float32(name, monkeypatch):
    """Where a model predicts noise and there is nearly nothing else, the image is a small difference of large numbers:
    in float32 the two are as far from each other as each is from float64.
    """
    config = {option: value for option, value in CONFIGS[name].items() if option != "variance_type"}
    scheduler, kind = scheduler_from_config(config), parameterization_from_config(config).kind
    for steps in STEPS:
        with monkeypatch.context() as patch:
            found, own, told = differences(theirs(config), scheduler, kind, steps, np.float32, patch)
        assert own < 1e-6 or own < 1.5 * found, steps
        assert found < 2e-5, steps
        assert told.max() < 1e-3, steps


def test_clipped_images_in_float32():
    torch, config, rng = import_module("torch"), CONFIGS["pixels"], np.random.default_rng(0)
    other, walk = theirs(config), scheduler_from_config(config).walk(20)
    other.set_timesteps(20)
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    latent, mine = torch.from_numpy(noise), mx.array(noise)
    for index, time in enumerate(other.timesteps):
        image = 2 * rng.standard_normal(SHAPE).astype(np.float32)
        latent = other.step(torch.from_numpy(image), time, latent, return_dict=False)[0]
        mine = walk.step(index, mine, [mx.array(image)])
        np.testing.assert_allclose(np.array(mine), latent.numpy(), atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_random_ddim(spacing, monkeypatch):
    config = {**KINDS["ddim"], **SD, **SPACINGS[spacing]}
    with monkeypatch.context() as patch:
        ours = replace(exact(config), eta=ETA)
        found, *_ = differences(theirs(config), ours, "epsilon", 20, np.float64, patch)
    assert found < 1e-6


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_tables_are_theirs_but_for_rounding(name, kind):
    """The most differs where a rescaled schedule has nearly no signal left."""
    config = {"_class_name": kind, **BETAS[name]}
    other, ours = theirs(config), scheduler_from_config(config).training
    bars = other.alphas_cumprod.numpy().astype(np.float64)
    np.testing.assert_allclose(ours.alpha_bars[:-1], bars[:-1], rtol=1e-6, atol=1e-9 if "snr" in name else 0)
    assert ours.alpha_bars[-1] == pytest.approx(bars[-1], rel=1e-6, abs=2.0**-24)
    if kind.startswith("Euler"):
        np.testing.assert_allclose(ours.sigmas, np.sqrt((1 - bars) / bars), rtol=2e-5 if "snr" in name else 1e-6)
        assert ours.sigmas[-1] == pytest.approx(float(other.sigmas.max()), rel=1e-6)
    if "snr" not in name:
        plain = Training(betas=tuple(other.betas.tolist()))
        np.testing.assert_allclose(plain.alpha_bars, bars, rtol=1e-7)
