"""The pictures of the report page, as data URIs: as they are while small, reduced and only some of them where they
would be too much.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ArtifactError
from ..files.explain import explain
from .page_plots import INK, colour
from .page_tables import decimals_of, dot, plain

Json = Mapping[str, Any]
# up to the first as they are; larger ones are reduced to the second and written as JPEG
LOSSLESS_SIDE, SIDE, QUALITY = 128, 384, 90
BUDGET = 8_000_000  # bytes of pictures in a page, before base64 makes four of three


@dataclass(frozen=True)
class Pictures:
    """Data URIs [models][prompts shown], which prompts those are, their size in pixels, and whether they are not the
    originals.
    """

    uris: list[list[str]]
    shown: list[int]
    size: tuple[int, int]
    reduced: bool


def embed(folder: Path, models: Sequence[Json], prompts: Sequence[Json], budget: int = BUDGET) -> Pictures:
    """Read the pictures of all models; where all would weigh more than ``budget``, of prompts spread evenly from the
    worst to the best.

    Raises ArtifactError on a picture that is missing or damaged.
    """
    order = _worst_first(models, len(prompts))
    first = [_encoded(_path(folder, model, order[0])) for model in models]
    weight = sum(len(data) for data, _, _ in first)
    count = min(len(prompts), max(1, budget // weight))
    shown = sorted({order[place] for place in np.linspace(0, len(order) - 1, count).round().astype(int)})
    rows = [[_encoded(_path(folder, model, prompt)) for prompt in shown] for model in models]
    uris = [[f"data:{kind};base64,{base64.b64encode(data).decode()}" for data, _, kind in row] for row in rows]
    reduced = any(kind == "image/jpeg" for row in rows for _, _, kind in row)
    return Pictures(uris, shown, first[0][1], reduced)


def _path(folder: Path, model: Json, prompt: int) -> Path:
    return folder / "images" / str(model["folder"]) / f"{prompt:04d}.png"


def _worst_first(models: Sequence[Json], count: int) -> list[int]:
    """Prompts by the mean PSNR of all models that have one, or in their order."""
    values = [model["each"]["psnr_db"] for model in models if model.get("each", {}).get("psnr_db")]
    return (
        [int(place) for place in np.argsort(np.mean(values, axis=0), kind="stable")] if values else list(range(count))
    )


def _encoded(path: Path) -> tuple[bytes, tuple[int, int], str]:
    """Bytes, size (width, height) and type of a picture as the page has it."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) <= LOSSLESS_SIDE:
                image.verify()
                return data, image.size, "image/png"
            reduced = image.convert("RGB")
            reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            reduced.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
            return buffer.getvalue(), reduced.size, "image/jpeg"
    except FileNotFoundError as error:
        raise explain(error, path) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ArtifactError(
            f"{path}: not readable as a picture ({error}); run the evaluation again with --force"
        ) from error


def viewer(models: Sequence[Json], pictures: Pictures) -> str:
    """Two pictures on top of each other, with a slider, a switch, or their difference; filled by the page's script."""
    options = "".join(f'<option value="{i}">{escape(model["name"])}</option>' for i, model in enumerate(models) if i)
    reference = escape(models[0]["name"])
    modes = {"slider": "Slider", "toggle": "Switch", "difference": "Difference"}
    buttons = "".join(f'<button type="button" data-mode="{mode}">{label}</button>' for mode, label in modes.items())
    width, height = pictures.size
    return f"""<div class="viewer{" smooth" if max(pictures.size) > LOSSLESS_SIDE else ""}">
<div class="stage" data-part="stage" style="aspect-ratio:{width}/{height}">
<img data-part="under" alt="{reference}"><img class="over" data-part="over" alt="the compared model">
<canvas data-part="canvas" hidden></canvas><i class="bar" data-part="bar"></i>
<span class="tag left" data-part="left">{reference}</span><span class="tag right" data-part="right"></span>
</div>
<div class="controls">
<div class="row"><button type="button" data-by="-1" aria-label="Previous prompt">◀</button><span data-part="place"></span>
<button type="button" data-by="1" aria-label="Next prompt">▶</button></div>
<div class="prompt" data-part="prompt"></div>
<label class="row">Compare {reference} with <select data-part="model">{options}</select></label>
<div class="row" role="group" aria-label="How to compare">{buttons}</div>
<div data-part="split-row"><input type="range" min="0" max="100" value="50" data-part="split" aria-label="Where the pictures meet"></div>
<div data-part="gain-row" hidden><label>Difference <span data-part="gain"></span>
<input type="range" min="0" max="6" value="3" data-part="amplify" aria-label="Amplification of the difference"></label></div>
<div><button type="button" data-part="flip" hidden>Show the other one</button></div>
<div class="sub" data-part="figures"></div>
<label class="row"><input type="checkbox" data-part="maps"> Differences in the grid below</label>
</div>
</div>"""  # noqa: E501 - markup


def grid(report: Json, models: Sequence[Json], pictures: Pictures) -> str:
    """Every picture shown: a row a prompt, a column a model."""
    per_image = [metric for metric in report["metrics"] if metric["per_image"]]
    heads = "".join(
        f'<div class="head">{dot(colour(i - 1) if i else INK)}{escape(model["name"])}</div>'
        for i, model in enumerate(models)
    )
    cells = []
    for place, index in enumerate(pictures.shown):
        prompt = report["prompts"][index]
        seed = f' <span class="sub">seed {prompt["seed"]}</span>' if "seed" in prompt else ""
        cells.append(f'<div class="said">{escape(said(prompt))}{seed}</div>')
        for i, model in enumerate(models):
            figures = [figure(model, metric, index) for metric in per_image[:2]]
            label = escape(f"{model['name']}: {said(prompt)}", quote=True)
            shown = f'<img id="p-{i}-{place}" src="{pictures.uris[i][place]}" alt="{label}">'
            cell = (
                f'<button type="button" class="cell" data-model="{i}" data-prompt="{place}">{shown}<canvas'
                " hidden></canvas></button>"
            )
            cells.append(f'<div>{cell}<span class="sub">{" · ".join(filter(None, figures))}</span></div>')
    smooth = " smooth" if max(pictures.size) > LOSSLESS_SIDE else ""
    aspect, columns = "/".join(map(str, pictures.size)), len(models)
    style = f"--columns:{columns};--aspect:{aspect};grid-template-columns:repeat({columns}, minmax(104px, 1fr))"
    return f'<div class="scroll{smooth}"><div class="grid" style="{style}">{heads}{"".join(cells)}</div></div>'


def said(prompt: Json) -> str:
    """What a picture is of: its prompt, or the name that it came with."""
    return str(prompt.get("text") or prompt.get("name") or f"prompt {prompt['index']}")


def figure(model: Json, metric: Json, index: int) -> str:
    """A picture's figure, with its unit; empty where it has none."""
    values = model.get("each", {}).get(metric["key"])
    if not values or values[index] is None:
        return ""
    return f"{plain(values[index], decimals_of(metric))}{' ' + metric['unit'] if metric['unit'] else ''}"


def limits(report: Json, pictures: Pictures) -> str:
    """What the page shows of the pictures, in words."""
    total, shown = len(report["prompts"]), len(pictures.shown)
    text = (
        f"All {total} prompts."
        if shown == total
        else f"{shown} of {total} prompts, spread evenly from the worst to the best PSNR."
    )
    if pictures.reduced:
        size = "×".join(map(str, pictures.size))
        text += (
            f" Reduced to {size} and written as JPEG, so the smallest differences are of that; figures are of the"
            " originals."
        )
    return f'<p class="hint">{text}</p>'
