"""The picture that users show each other: reference and quantized images side by side, with amplified differences and
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..files.atomic import atomic_file
from ..metrics.attributes import Marks, accuracy, shares
from ..metrics.psnr import psnr
from ..numerics.arrays import Array
from ..sampling.prompts import Prompt

Images = Array
Judge = Callable[[Images, Sequence[str]], Sequence[Marks] | None]

CELL, GAP, CAPTION, HEADER, LABEL = 144, 10, 24, 64, 22
INK, PALE, PAPER, LINE = (25, 25, 28), (105, 105, 112), (255, 255, 255), (222, 222, 226)


@dataclass(frozen=True)
class Comparison:
    """Pictures [B,H,W,3] in [0,1] by model name, the reference first.

    ``psnr_db`` has the decibels [B] of every other model against it; ``accuracy`` the share of prompt attributes that
    each model's pictures obey (over all, and per picture), empty where the model cannot tell.
    """

    prompts: list[Prompt]
    images: dict[str, Images]
    psnr_db: dict[str, npt.NDArray[np.float64]]
    accuracy: dict[str, dict[str, float]]
    accuracy_each: dict[str, list[float]]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], images: Mapping[str, Images], attributes: Judge) -> Comparison:
        """Measure pictures; ``attributes`` is the adapter's judge."""
        reference = next(iter(images))
        texts = [p.text for p in prompts]
        marked, each = {}, {}
        for name, batch in images.items():
            if (marks := attributes(batch, texts)) is not None:
                marked[name], each[name] = accuracy(marks), shares(marks)[0]
        decibels = {name: psnr(batch, images[reference]) for name, batch in images.items() if name != reference}
        return cls(list(prompts), dict(images), decibels, marked, each)

    @property
    def reference(self) -> str:
        return next(iter(self.images))

    def figures(self, name: str) -> str:
        """One line on a model: mean PSNR against the reference and attribute accuracy."""
        parts = [f"{self.psnr_db[name].mean():.1f} dB"] if name in self.psnr_db else []
        if name in self.accuracy:
            parts.append(f"accuracy {100 * self.accuracy[name]['mean']:.1f} %")
        return " · ".join(parts)

    def draw(self, rows: int = 8, amplify: float = 8.0) -> Image.Image:
        """The comparison as a picture: one row a prompt (the first ``rows``), reference, models, then differences times
        ``amplify``.
        """
        names = list(self.images)
        others = names[1:]
        shown = min(rows, len(self.prompts))
        columns = len(names) + len(others)
        shape = next(iter(self.images.values())).shape
        height = round(CELL * shape[1] / shape[2])
        row_height = CAPTION + height + LABEL + GAP
        page = Image.new("RGB", (GAP + columns * (CELL + GAP), HEADER + shown * row_height + LABEL), PAPER)
        pen = ImageDraw.Draw(page)
        titles = [(name, self.figures(name)) for name in names] + [
            (f"{name} - {names[0]}", f"difference x {amplify:g}") for name in others
        ]
        for column, (title, figures) in enumerate(titles):
            x = GAP + column * (CELL + GAP)
            pen.text((x, 10), _fitted(title, CELL, _font(15)), INK, _font(15))
            pen.text((x, 34), figures, PALE, _font(11))
        for row in range(shown):
            top = HEADER + row * row_height
            pen.line([(GAP, top - GAP // 2), (page.width - GAP, top - GAP // 2)], LINE)
            prompt = self.prompts[row]
            pen.text((GAP, top), f"{prompt.text}   (seed {prompt.seed})", INK, _font(13))
            cells = [(self.images[name][row], self._label(name, row)) for name in names]
            for name in others:
                difference = np.abs(self.images[name][row] - self.images[names[0]][row])
                cells.append((np.clip(difference * amplify, 0, 1), f"largest {difference.max():.3f}"))
            for column, (image, label) in enumerate(cells):
                x = GAP + column * (CELL + GAP)
                page.paste(_scaled(image, CELL, height), (x, top + CAPTION))
                pen.text((x, top + CAPTION + height + 3), label, PALE, _font(11))
        pen.text(
            (GAP, page.height - LABEL + 2),
            f"first {shown} of {len(self.prompts)} prompts; figures in the header are over all",
            PALE,
            _font(11),
        )
        return page

    def _label(self, name: str, row: int) -> str:
        parts = [f"{self.psnr_db[name][row]:.1f} dB"] if name in self.psnr_db else []
        if name in self.accuracy_each:
            parts.append(f"accuracy {100 * self.accuracy_each[name][row]:.0f} %")
        return " · ".join(parts)

    def save(self, path: str | Path, rows: int = 8, amplify: float = 8.0) -> Path:
        """Write ``draw`` as a PNG, atomically; raises ArtifactError where it cannot be written."""
        return save_png(self.draw(rows, amplify), path)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG atomically; raises ArtifactError where it cannot be written."""
    path = Path(path)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def to_pil(image: Images) -> Image.Image:
    """A picture [H,W,3] in [0,1] as an 8-bit image."""
    return Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))


def _scaled(image: Images, width: int, height: int) -> Image.Image:
    picture = to_pil(image)
    enlarge = picture.width < width  # small pictures keep their pixels
    return picture.resize((width, height), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Text cut to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
