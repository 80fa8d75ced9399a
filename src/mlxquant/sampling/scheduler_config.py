"""Schedulers and parameterizations from a diffusers ``scheduler_config.json``.

Every option that a file can have is one of four things here: it is read; or it must be what it is by default, for other
values would change the result and are not supported; or it changes nothing in this class, for diffusers' own class does
not read it either, or only beside another option; or it is unknown, and an error. So what is built draws what diffusers
draws, or is not built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ArtifactError, reason
from ..files import schema
from ..files.explain import explain
from ..files.schema import MismatchError, Schema
from .parameterizations import EPSILON, FLOW, SAMPLE, Parameterization, V
from .pndm import PNDM
from .schedulers import DDIM, DPMSolver, Euler, EulerAncestral, FlowEuler, Scheduler
from .schedules import BETAS, EXPONENTIAL, KARRAS, LEADING, LINSPACE, SPACINGS, Training

FILE = "scheduler_config.json"
PREDICTIONS = {"epsilon": EPSILON, "v_prediction": V, "sample": SAMPLE, "flow_prediction": FLOW}
LEARNED = ("learned", "learned_range")

Options = dict[str, Any]


def _log(value: Any, where: str) -> None:
    """The schema of a least log-SNR: a number, or minus infinity."""
    if value not in (-math.inf, "-inf", "-Infinity"):
        schema.number()(value, where)


_flag, _positive = schema.maybe(schema.flag), schema.number(1e-12)
_sigma = schema.maybe(_positive)

TRAINED: dict[str, tuple[Schema, Any]] = {
    "num_train_timesteps": (schema.whole(1, 10**6), 1000),
    "beta_start": (_positive, 0.0001),
    "beta_end": (_positive, 0.02),
    "beta_schedule": (schema.one_of(*BETAS), "linear"),
    "trained_betas": (schema.maybe(schema.array_of(_positive, 1)), None),
    "prediction_type": (schema.one_of("epsilon", "v_prediction", "sample"), "epsilon"),
    "timestep_spacing": (schema.one_of(*SPACINGS), LINSPACE),
    "steps_offset": (schema.whole(), 0),
    "rescale_betas_zero_snr": (_flag, False),
    "variance_type": (schema.maybe(schema.text), None),
}
GRIDS: dict[str, tuple[Schema, Any]] = {"use_karras_sigmas": (_flag, False), "use_exponential_sigmas": (_flag, False)}
END: tuple[Schema, Any] = (schema.one_of("zero", "sigma_min"), "zero")


@dataclass(frozen=True)
class SchedulerClass:
    """What a class of diffusers becomes here.

    Attributes:
        build: The scheduler, from all options.
        options: What is read, with its schema and its default in diffusers.
        fixed: What must have this value.
    """

    build: Callable[[Options], Scheduler]
    options: Mapping[str, tuple[Schema, Any]]
    fixed: Mapping[str, Any]


def _training(options: Options) -> Training:
    betas = options["trained_betas"]
    return Training(
        options["num_train_timesteps"],
        options["beta_start"],
        options["beta_end"],
        options["beta_schedule"],
        None if betas is None else tuple(betas),
        bool(options["rescale_betas_zero_snr"]),
    )


def _grid(options: Options) -> str | None:
    """Raises AdapterError where two grids are asked for."""
    if options["use_karras_sigmas"] and options["use_exponential_sigmas"]:
        raise AdapterError("use_karras_sigmas and use_exponential_sigmas are both set; expected one of them at most")
    return KARRAS if options["use_karras_sigmas"] else EXPONENTIAL if options["use_exponential_sigmas"] else None


def _flow_euler(options: Options) -> Scheduler:
    return FlowEuler(options["shift"], options["num_train_timesteps"], _grid(options))


def _spaced(options: Options) -> tuple[Training, str, int]:
    return _training(options), options["timestep_spacing"], options["steps_offset"]


def _euler(options: Options) -> Scheduler:
    to_zero = options["final_sigmas_type"] == "zero"
    return Euler(*_spaced(options), _grid(options), options["sigma_min"], options["sigma_max"], to_zero)


def _euler_ancestral(options: Options) -> Scheduler:
    return EulerAncestral(*_spaced(options))


def _ddim(options: Options) -> Scheduler:
    clip = float(options["clip_sample_range"]) if options["clip_sample"] else None
    return DDIM(*_spaced(options), bool(options["set_alpha_to_one"]), clip)


def _pndm(options: Options) -> Scheduler:
    """Raises AdapterError where Runge-Kutta steps are not skipped."""
    if not options["skip_prk_steps"]:
        raise AdapterError(
            "PNDMScheduler without skip_prk_steps is not supported, for its Runge-Kutta steps ask a model at other"
            " times; expected true"
        )
    to_zero, kind = bool(options["set_alpha_to_one"]), PREDICTIONS[options["prediction_type"]]
    return PNDM(*_spaced({**options, "rescale_betas_zero_snr": False}), to_zero, kind)


def _dpm_solver(options: Options) -> Scheduler:
    return DPMSolver(
        *_spaced(options),
        order=options["solver_order"],
        heun=options["solver_type"] == "heun",
        random=options["algorithm_type"] == "sde-dpmsolver++",
        lower_order_final=bool(options["lower_order_final"]),
        euler_at_final=bool(options["euler_at_final"]),
        grid=_grid(options),
        flow_shift=float(options["flow_shift"]) if options["use_flow_sigmas"] else None,
        to_zero=options["final_sigmas_type"] == "zero",
        least_log=float(options["lambda_min_clipped"]),
    )


CLASSES = {
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        _flow_euler,
        {
            "num_train_timesteps": TRAINED["num_train_timesteps"],
            "shift": (_positive, 1.0),
            "prediction_type": (schema.one_of("flow_prediction"), "flow_prediction"),
            **GRIDS,
        },
        {
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            "invert_sigmas": False,
            "use_beta_sigmas": False,
            "stochastic_sampling": False,
        },
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        _euler,
        TRAINED | GRIDS | {"sigma_min": (_sigma, None), "sigma_max": (_sigma, None), "final_sigmas_type": END},
        {"interpolation_type": "linear", "timestep_type": "discrete", "use_beta_sigmas": False},
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(_euler_ancestral, TRAINED, {}),
    "DDIMScheduler": SchedulerClass(
        _ddim,
        TRAINED
        | {
            "timestep_spacing": (schema.one_of(*SPACINGS), LEADING),
            "clip_sample": (_flag, True),
            "clip_sample_range": (_positive, 1.0),
            "set_alpha_to_one": (_flag, True),
        },
        {"thresholding": False},
    ),
    "PNDMScheduler": SchedulerClass(
        _pndm,
        {name: one for name, one in TRAINED.items() if name != "rescale_betas_zero_snr"}
        | {
            "prediction_type": (schema.one_of("epsilon", "v_prediction"), "epsilon"),
            "timestep_spacing": (schema.one_of(*SPACINGS), LEADING),
            "set_alpha_to_one": (_flag, False),
            "skip_prk_steps": (_flag, False),
        },
        {},
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        _dpm_solver,
        TRAINED
        | GRIDS
        | {
            "prediction_type": (schema.one_of(*PREDICTIONS), "epsilon"),
            "solver_order": (schema.one_of(1, 2), 2),
            "algorithm_type": (schema.one_of("dpmsolver++", "sde-dpmsolver++"), "dpmsolver++"),
            "solver_type": (schema.one_of("midpoint", "heun"), "midpoint"),
            "lower_order_final": (_flag, True),
            "euler_at_final": (_flag, False),
            "use_flow_sigmas": (_flag, False),
            "flow_shift": (_positive, 1.0),
            "final_sigmas_type": END,
            "lambda_min_clipped": (_log, -math.inf),
        },
        {"thresholding": False, "use_beta_sigmas": False, "use_lu_lambdas": False, "use_dynamic_shifting": False},
    ),
}

# what says something only beside an option that must be off, and what other classes of diffusers have
IDLE = (
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "predict_x0",
    "solver_p",
    "disable_corrector",
)
ELSEWHERE = {*IDLE, *(name for one in CLASSES.values() for name in (*one.options, *one.fixed))}


def scheduler_from_config(config: Mapping[str, Any] | Path | str) -> Scheduler:
    """The scheduler that diffusers would build.

    Args:
        config: A ``scheduler_config.json``, a folder that has one, or what such a file says. Another class reads the
            same options, as in diffusers: ``{**config, "_class_name": "DDIMScheduler"}``.

    Returns:
        One of ``FlowEuler``, ``Euler``, ``EulerAncestral``, ``DDIM``, ``PNDM``, ``DPMSolver``.

    Raises:
        ArtifactError: The file cannot be read, or is no JSON object.
        AdapterError: A class, an option or a value of one is not supported; it is named, with what is.
    """
    where, said = _read(config)
    one, options = _options(where, said)
    try:
        return one.build(options)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error


def parameterization_from_config(config: Mapping[str, Any] | Path | str) -> Parameterization:
    """What a model predicts, by the configuration of its scheduler.

    Args:
        config: See ``scheduler_from_config``.

    Raises:
        ArtifactError: See there.
        AdapterError: See there.
    """
    _, options = _options(*_read(config))
    return Parameterization(PREDICTIONS[options["prediction_type"]], options.get("variance_type") in LEARNED)


def _read(config: Mapping[str, Any] | Path | str) -> tuple[str, Options]:
    """Where a configuration is, for messages, and what it says."""
    if isinstance(config, Mapping):
        return "scheduler", dict(config)
    path = Path(config)
    path = path / FILE if path.is_dir() else path
    try:
        # not files.schema.json_value: diffusers writes -Infinity into these files
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain(error, path) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no JSON ({reason(error)}); get the scheduler's configuration again") from error
    if not isinstance(said, dict):
        raise ArtifactError(f"{path}: not a JSON object; expected the configuration of a scheduler of diffusers")
    return str(path), said


def _options(where: str, said: Options) -> tuple[SchedulerClass, Options]:
    """The class, and all of its options with defaults for those that are not said."""
    name = said.get("_class_name")
    one = CLASSES.get(name) if isinstance(name, str) else None
    if one is None:
        raise AdapterError(
            f"{where}: _class_name {name!r} is not supported; expected one of {', '.join(CLASSES)}, of which each reads"
            " what the configuration of another says"
        )
    for option, value in said.items():
        if option.startswith("_"):
            continue
        if option in one.options:
            try:
                one.options[option][0](value, option)
            except MismatchError as error:
                raise AdapterError(f"{where}: {name} of mlxquant: {error}") from error
        elif option in one.fixed and value not in (one.fixed[option], None):
            raise AdapterError(
                f"{where}: {name} with {option} {value!r} is not supported; expected {one.fixed[option]!r}"
            )
        elif option not in ELSEWHERE:
            raise AdapterError(f"{where}: {name} has no option {option!r}; expected some of {', '.join(one.options)}")
    return one, {option: said.get(option, default) for option, (_, default) in one.options.items()}
