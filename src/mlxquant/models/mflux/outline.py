"""What a pipeline would do while it draws a prompt: how often it calls its modules, and with how much. Nothing is
computed, so nothing of the weights is read but the headers of their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...sampling.picture_size import PictureSize
from ...sampling.prompts import Prompt
from ..recorded.outline import Outline, outlined, unevaluated
from ..recorded.trees import arrays, mapped
from ..recorded.watching import uncompiled, watched
from .components import spine
from .pipeline import MfluxPipeline

ANY = Prompt(0, "a lighthouse at dusk")
HUB_OFFLINE = "HF_HUB_OFFLINE"


@dataclass
class Called:
    """A module of a component that the pipeline calls.

    Attributes:
        component: The component's name.
        path: Where in it the module is; "" for the component itself.
        outline: Its first call.
        calls: How many calls a prompt takes.
    """

    component: str
    path: str
    outline: Outline
    calls: int = 1


_NOTHING: Any = None  # until the call that is being outlined is over


class _Drawn(BaseException):
    """The decoder is reached; no error, so that no ``except Exception`` on the way stops it."""


def called_modules(
    pipeline: MfluxPipeline,
    steps: int | None = None,
    cfg: float | None = None,
    size: PictureSize | None = None,
    negative: str | None = None,
    prompt: Prompt = ANY,
) -> dict[str, Called]:
    """Draw a prompt without computing anything, up to the decoder.

    The transformer's answers are zeros, and of calls of the same shapes only the first is outlined.

    Args:
        pipeline: The pipeline, in full precision.
        steps: As for ``MfluxPipeline.draw``, as are the others.
        cfg: Weight of guidance.
        size: Width and height of the picture.
        negative: The negative prompt.
        prompt: What to draw.

    Returns:
        Of each component but the decoder the module that is called, by the component's name; a component that is not
        called is left out.

    Raises:
        AdapterError: The pipeline does not draw so.
        ArtifactError: Drawing stops inside of mflux.
    """
    found: dict[str, Called] = {}
    shown: dict[tuple[Any, ...], Any] = {}
    parts, ends = dict[tuple[str, str], nn.Module](), dict[str, nn.Module]()
    for component in pipeline.components:
        if component.purpose == "decoder":
            ends |= {f"{component.name}.{path}": part for path, part in component.module.named_modules()}
        else:
            parts |= {(component.name, path): part for path, part in spine(component.module)}
    answers = {one.name for one in pipeline.components if one.purpose == "transformer"}
    names = {f"{name}|{path}": (name, path) for name, path in parts}

    def answer(key: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        name, path = names[key]
        if name in found and found[name].path != path:
            return run()  # inside of what is called already
        shapes = (name, *((at, one.shape, one.dtype) for at, one in arrays((args, kwargs)).items()))
        if name in found:
            found[name].calls += 1
        if shapes in shown:
            return shown[shapes]
        if name in found:
            returned = run()
        else:
            found[name] = Called(name, path, _NOTHING)
            returned, found[name].outline = outlined(parts[name, path], (args, kwargs), run)
        if name in answers:
            shown[shapes] = returned = mapped(returned, _zeros)
        return returned

    def end(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        raise _Drawn

    pipeline.forget_texts()
    modules = {f"{name}|{path}": part for (name, path), part in parts.items()}
    quiet = redirect_stderr(StringIO())  # mflux draws bars
    with unevaluated(), uncompiled(), quiet, watched(modules, answer), watched(ends, end):
        try:
            pipeline.draw([prompt], steps, cfg, size, negative)
        except _Drawn:
            pass
        finally:
            pipeline.forget_texts()  # what it keeps of them has no values
    return found


@contextmanager
def unread() -> Iterator[None]:
    """Inside, pipelines are loaded without their weights, of which some would be read at once, and nothing is
    downloaded.
    """
    hub: Any = import_module("huggingface_hub.constants")
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        with unevaluated():
            yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _zeros(path: Any, leaf: Any) -> Any:
    return mx.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else leaf
