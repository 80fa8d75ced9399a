"""Configurations of diffusers: what is read, what is refused and how."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import json
import math

import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.sampling.parameterizations import Parameterization
from mlxquant.sampling.pndm import PNDM
from mlxquant.sampling.scheduler_config import CLASSES, parameterization_from_config, scheduler_from_config
from mlxquant.sampling.schedulers import DDIM, DPMSolver, Euler, EulerAncestral, FlowEuler
from mlxquant.sampling.schedules import Training

from support.scheduler_configs import CONFIGS

SD = Training(first=0.00085, last=0.012, schedule="scaled_linear")


@pytest.mark.parametrize(
    ("name", "scheduler", "parameterization"),
    [
        ("sd3", FlowEuler(3.0), Parameterization("flow")),
        ("pixart", DPMSolver(), Parameterization("epsilon", learned_variance=True)),
        ("sd1.5", PNDM(SD, "leading", 1), Parameterization("epsilon")),
        ("sd1.5 ddim", DDIM(SD, "leading", 1, False), Parameterization("epsilon")),
        ("sd1.5 dpm", DPMSolver(SD, "linspace", 1), Parameterization("epsilon")),
        ("sd2.1", DDIM(SD, "leading", 1, False), Parameterization("v")),
        ("sdxl", Euler(SD, "leading", 1), Parameterization("epsilon")),
        ("sdxl karras", Euler(SD, "leading", 1, grid="karras"), Parameterization("epsilon")),
        ("sdxl turbo", EulerAncestral(SD, "trailing", 1), Parameterization("epsilon")),
        ("sana", DPMSolver(flow_shift=3.0), Parameterization("flow")),
        ("pixels", DDIM(Training(schedule="squaredcos_cap_v2"), clip=1.0), Parameterization("sample")),
        ("zero snr", DDIM(Training(zero_snr=True), "trailing"), Parameterization("v")),
    ],
)
def test_public_configurations(name, scheduler, parameterization):
    assert scheduler_from_config(CONFIGS[name]) == scheduler
    assert parameterization_from_config(CONFIGS[name]) == parameterization


@pytest.mark.parametrize("name", sorted({*CLASSES} - {"PNDMScheduler"}))
def test_what_is_not_said_is_as_in_diffusers(name):
    defaults = {
        "FlowMatchEulerDiscreteScheduler": FlowEuler(1.0),
        "EulerDiscreteScheduler": Euler(Training(), "linspace"),
        "EulerAncestralDiscreteScheduler": EulerAncestral(Training(), "linspace"),
        "DDIMScheduler": DDIM(Training(), "leading", clip=1.0),
        "DPMSolverMultistepScheduler": DPMSolver(Training(), "linspace"),
    }
    assert scheduler_from_config({"_class_name": name}) == defaults[name]


def test_a_file_and_its_folder_are_read(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(CONFIGS["pixart"]))
    assert "-Infinity" in (tmp_path / "scheduler_config.json").read_text()
    for path in (tmp_path, tmp_path / "scheduler_config.json", str(tmp_path)):
        assert scheduler_from_config(path) == DPMSolver()
    with pytest.raises(ArtifactError, match="no JSON"):
        (tmp_path / "scheduler_config.json").write_text("{")
        scheduler_from_config(tmp_path)
    with pytest.raises(ArtifactError, match="not a JSON object"):
        (tmp_path / "scheduler_config.json").write_text("[]")
        scheduler_from_config(tmp_path)
    with pytest.raises(ArtifactError, match="elsewhere"):
        scheduler_from_config(tmp_path / "elsewhere")


def test_pndm_is_known_without_its_runge_kutta_steps():
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert scheduler_from_config(config) == PNDM(Training(), "leading", to_zero=False)
    assert scheduler_from_config({**config, "prediction_type": "v_prediction"}).kind == "v"
    for skip in ({}, {"skip_prk_steps": False}):
        with pytest.raises(AdapterError, match=r"PNDMScheduler without skip_prk_steps is not.*expected true"):
            scheduler_from_config({"_class_name": "PNDMScheduler", **skip})


@pytest.mark.parametrize("name", [None, "UniPCMultistepScheduler", 3, ["DDIMScheduler"]])
def test_other_classes_are_refused_by_name(name):
    with pytest.raises(AdapterError, match=r"_class_name .* is not supported; expected one of FlowMatchEuler") as error:
        scheduler_from_config({"_class_name": name})
    assert repr(name) in str(error.value)
    assert "DPMSolverMultistepScheduler" in str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sd3", "use_dynamic_shifting", True),
        ("sd3", "shift_terminal", 0.02),
        ("sd3", "invert_sigmas", True),
        ("sd3", "stochastic_sampling", True),
        ("sd3", "use_beta_sigmas", True),
        ("sd3", "shift", 0.0),
        ("sdxl", "interpolation_type", "log_linear"),
        ("sdxl", "timestep_type", "continuous"),
        ("sdxl", "beta_schedule", "exp"),
        ("sdxl", "final_sigmas_type", "one"),
        ("sdxl", "prediction_type", "flow_prediction"),
        ("sdxl", "sigma_min", -1.0),
        ("sd1.5 ddim", "thresholding", True),
        ("sd1.5 ddim", "timestep_spacing", "quadratic"),
        ("sd1.5 ddim", "num_train_timesteps", "many"),
        ("sd1.5 ddim", "trained_betas", [0.1, "a"]),
        ("sd1.5 ddim", "eta", 1.0),
        ("sd1.5", "prediction_type", "sample"),
        ("sd1.5", "timestep_spacing", "quadratic"),
        ("pixart", "solver_order", 3),
        ("pixart", "algorithm_type", "dpmsolver"),
        ("pixart", "solver_type", "bh2"),
        ("pixart", "use_lu_lambdas", True),
        ("pixart", "lambda_min_clipped", "low"),
        ("pixart", "lambda_min_clipped", math.nan),
        ("pixart", "an option of next year", 1),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(name, option, value):
    with pytest.raises(AdapterError, match=f"^scheduler: .*{option}.*expected") as error:
        scheduler_from_config({**CONFIGS[name], option: value})
    assert len(str(error.value)) <= 500


def test_two_grids_and_impossible_betas_are_refused():
    with pytest.raises(AdapterError, match="use_karras_sigmas and use_exponential_sigmas are both set"):
        scheduler_from_config({**CONFIGS["sdxl karras"], "use_exponential_sigmas": True})
    with pytest.raises(AdapterError, match="scheduler: betas must be between 0 and 1"):
        scheduler_from_config({**CONFIGS["sdxl"], "beta_end": 2.0})


def test_options_of_other_classes_change_nothing():
    """As in diffusers, where a scheduler is made from another one's configuration."""
    more = {"skip_prk_steps": True, "use_karras_sigmas": True, "clip_sample": True, "solver_order": 3, "shift": 3.0}
    config = CONFIGS["sdxl turbo"]
    assert scheduler_from_config(config | more) == scheduler_from_config(config)
