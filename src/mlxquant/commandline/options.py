"""Options that several commands share, and the short way to declare one: a default is always shown."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from .._blas import prefer_fast_blas
from ..errors import AdapterError
from ..sampling.picture_size import PictureSize, picture_size
from ..sampling.prompts import LARGEST_SEED

Decorator = Callable[[Any], Any]
PATH = click.Path(path_type=Path)
COUNT, FROM_ZERO, SEED = click.IntRange(1), click.IntRange(0), click.IntRange(0, LARGEST_SEED)
MODEL_HELP = "A model's name (mmdit-shapes, sd3-medium), a hub id, a folder or file with its weights, or NAME@PLACE."
HOST = "mlxquant.host"  # of a command's context: what --host says
HOSTS = ("diffusionkit",)  # other programs whose modules can run a model
MFLUX_HELP = "Or a model of mflux, as mflux:NAME[@HUB_ID_OR_FOLDER]."
# of a command's context: --out_dir is --out-dir
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}


def option(*names: str, **more: Any) -> Decorator:
    """As ``click.option``; where there is a default the help shows it."""
    if "default" in more:
        more["show_default"] = True
    return click.option(*names, **more)


def together(*options: Decorator) -> Decorator:
    """Several options as one, in this order."""

    def add(function: Any) -> Any:
        for one in reversed(options):
            function = one(function)
        return function

    return add


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise AdapterError where one of these parameters was given, saying ``why`` it means nothing."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, ())]
    if wrong:
        raise AdapterError(f"{' and '.join(wrong)} {why}; leave {'it' if len(wrong) == 1 else 'them'} out")


def model_option(*names: str, **more: Any) -> Decorator:
    """``--model``, and ``--host``, by which the reference becomes HOST:REFERENCE; arguments as for ``option``."""
    host = option(
        "--host",
        type=click.Choice(HOSTS),
        is_eager=True,
        expose_value=False,
        callback=_note_host,
        help="Run Stable Diffusion 3 Medium on this program's modules.  [default: our own]",
    )
    return together(option("--model", *names, callback=_hosted, **more), host)


def models_option(what: str) -> Decorator:
    """``--model``, which may be given several times, and ``--host``."""
    return model_option("names", multiple=True, required=True, help=what)


def _note_host(ctx: click.Context, parameter: click.Parameter, host: str | None) -> None:
    ctx.meta[HOST] = host


def _hosted(ctx: click.Context, parameter: click.Parameter, said: Any) -> Any:
    """A reference, or several, for the host that was asked for. A quantized model knows its own."""
    if (host := ctx.meta.get(HOST)) is None or said is None:
        return said
    if isinstance(said, tuple):
        return tuple(_hosted(ctx, parameter, one) for one in said)
    return said if (Path(said) / "model.json").exists() else f"{host}:{said}"


def prompts_options(what: str, count: int) -> Decorator:
    """A file of prompts and how many of them; without a file ``count`` of the model's own."""
    return together(
        option(
            "--prompts", "prompt_file", type=PATH, help=f"{what}, one seed<TAB>prompt a line.  [default: the model's]"
        ),
        option(
            "--num-prompts", type=COUNT, help=f"Use the first N.  [default: all of the file, {count} of the model's]"
        ),
    )


def seed_option(what: str | None = None) -> Decorator:
    return option("--seed", default=0, type=SEED, help=what)


def _speak(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        log = logging.getLogger("mlxquant")
        log.setLevel(logging.DEBUG)
        log.debug("MLX's CPU matmul runs on %s", prefer_fast_blas() or "its own BLAS")


class Pixels(click.ParamType):  # type: ignore[type-arg]  # generic in some releases of click only
    """``768x512``, or ``512`` for a square."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PictureSize:
        try:
            return picture_size(value)
        except AdapterError as error:
            self.fail(str(error), param, ctx)


size_option = option(
    "--size",
    type=Pixels(),
    metavar="WIDTHxHEIGHT",
    help="Pixels of a picture, such as 768x512, or 512 for a square.  [default: the model's]",
)
negative_option = option(
    "--negative-prompt",
    "negative",
    metavar="TEXT",
    help="What guidance leads away from.  [default: the model's, mostly the empty prompt]",
)
pipeline_options = together(  # of what quantizes a pipeline of mflux
    option("--text-recipe", help="For the text encoders of an mflux model, or 'keep'.  [default: round to 8 bits]"),
    option("--vae-recipe", help="For the decoder of an mflux model, or 'keep'.  [default: keep]"),
    option("--lora-paths", multiple=True, help="A LoRA file, baked into an mflux model before it is calibrated."),
    option("--lora-scales", type=float, multiple=True, help="Its scale, in the order of --lora-paths.  [default: 1]"),
)
iters_option = option("--iters", type=COUNT, help="Adam steps a block, for recipes that learn.  [default: 1000]")
force_option = option("--force", is_flag=True, help="Replace an existing folder.")
resume_option = option("--resume/--no-resume", default=True, help="Go on where a killed run of the same job was.")
verbose_option = option("--verbose", is_flag=True, expose_value=False, callback=_speak, help="Say more on stderr.")


def replay_options(stride: int, folder: str, seed: str) -> Decorator:
    """Of a step that replays trajectories: which of them, by which model, and where the result goes.

    Args:
        stride: By default every so-manieth step of a trajectory is replayed.
        folder: Where the result goes by default, below the trajectories.
        seed: What the seed decides.
    """
    return together(
        option("--calib-dir", type=PATH, required=True, help="Folder that generate-calibration-data wrote."),
        option("--output-dir", type=PATH, help=f"Folder for the result.  [default: CALIB_DIR/{folder}]"),
        option("--num-images", default=5, type=COUNT, help="Use the first N images."),
        option("--stride", default=stride, type=COUNT, help="Use every N-th step."),
        seed_option(seed),
        model_option(
            "name",
            help="Where its weights are: a hub id or a folder.  [default: that of the trajectories, by its name]",
        ),
        option("--force", is_flag=True, help="Replace a result that is there."),
        resume_option,
        verbose_option,
    )


run_options = together(force_option, resume_option, verbose_option)  # of what takes long and writes a folder
