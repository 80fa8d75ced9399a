"""Captioned pictures of coloured shapes: what ``mmdit-shapes`` is trained on, and the checker that marks its images.

A scene is a full specification; its caption says everything but the jitter. So whether an image obeys its prompt is
decided by code: ``check`` fits the picture with the same renderer that drew the training data and compares what it
finds with the caption.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...errors import AdapterError
from ...numerics.arrays import Array

SIDE = 32
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 180),
    "orange": (245, 130, 30),
    "cyan": (40, 205, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (125, 125, 125), "pink": (250, 185, 200)}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"large": 10.5, "small": 7.25}
PLACES = {"at left": (-1, 0), "at right": (1, 0), "at top": (0, -1), "at bottom": (0, 1), "at center": (0, 0)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OFFSET = {"large": 5.0, "small": 8.0, "pair": 8.0}
MISFIT = 0.3  # a shape whose best fit leaves more squared error than this share of its area is none of ours
EVEN, BORDER = 0.25, 0.7  # a background is this share of the border within this distance [0, sqrt 3] of its colour
PLAIN = 0.35  # a figure's colour, the median of its pixels, is within this distance of what it is called
VISIBLE = 24  # pixels; a small shape has at least 60
HELD_OUT = 8  # one caption in this many is never trained on

Image = Array  # [32,32,3] in [0,1]


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One object with a size and a place, or two objects with a relation."""

    things: tuple[Thing, ...]
    background: str
    size: str | None = None
    where: str = "at center"

    @property
    def caption(self) -> str:
        a = self.things[0]
        if self.size is not None:
            head = f"a {self.size} {a.colour} {a.shape} {self.where}"
        else:
            b = self.things[1]
            head = f"a {a.colour} {a.shape} {self.where} a {b.colour} {b.shape}"
        return f"{head} on {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this caption; a fixed hash of the text, the same everywhere."""
        return zlib.crc32(self.caption.encode()) % HELD_OUT == 0


def parse(caption: str) -> Scene:
    """The scene that a caption describes; raises AdapterError with the grammar when it does not follow it."""
    words = caption.lower().split()
    text = " ".join(words)
    background = words[-2] if len(words) > 2 else ""
    scene: Scene | None = None
    if len(words) >= 8 and words[1] in RADII:
        scene = Scene((Thing(words[2], words[3]),), background, size=words[1], where=" ".join(words[4:6]))
    elif len(words) >= 9:
        where = next((r for r in RELATIONS if f" {r} a " in text), "")
        rest = words[4 + len(where.split()) :]
        if where:
            scene = Scene((Thing(words[1], words[2]), Thing(rest[0], rest[1])), background, where=where)
    if scene is not None and scene.caption == text and _valid(scene):
        return scene
    raise AdapterError(
        f"mmdit-shapes cannot draw {caption!r}. It knows 'a SIZE COLOUR SHAPE PLACE on BACKGROUND background' and 'a"
        f" COLOUR SHAPE RELATION a COLOUR SHAPE on BACKGROUND background' with sizes {sorted(RADII)}, colours"
        f" {sorted(COLOURS)}, shapes {sorted(SHAPES)}, places {sorted(PLACES)}, relations {sorted(RELATIONS)},"
        f" backgrounds {sorted(BACKGROUNDS)}."
    )


def _valid(scene: Scene) -> bool:
    things = all(t.colour in COLOURS and t.shape in SHAPES for t in scene.things)
    where = scene.where in (PLACES if scene.size is not None else RELATIONS)
    distinct = len({t.colour for t in scene.things}) == len(scene.things)
    return things and where and distinct and scene.background in BACKGROUNDS


def sample_scene(rng: np.random.Generator, pairs: float = 0.35) -> Scene:
    """A random scene; ``pairs`` is the share of two-object scenes."""
    background = str(rng.choice(list(BACKGROUNDS)))
    if rng.random() < pairs:
        colours = rng.choice(list(COLOURS), 2, replace=False)
        things = tuple(Thing(str(c), str(rng.choice(SHAPES))) for c in colours)
        return Scene(things, background, where=str(rng.choice(list(RELATIONS))))
    thing = Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
    return Scene((thing,), background, size=str(rng.choice(list(RADII))), where=str(rng.choice(list(PLACES))))


def captions(held_out: bool, count: int) -> list[str]:
    """The first ``count`` of a fixed list of distinct captions, either all held out from training or none; at most
    1000.
    """
    if count > 1000:
        raise AdapterError(
            f"mmdit-shapes has 1000 prompts of its own for each purpose, {count} were asked for; use a prompt file"
        )
    rng = np.random.default_rng(int(held_out))
    found: dict[str, None] = {}
    while len(found) < count:
        scene = sample_scene(rng)
        if scene.held_out == held_out:
            found[scene.caption] = None
    return list(found)


_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def coverage(shape: str, cx: float, cy: float, r: float) -> Image:
    """Antialiased mask [32,32] of a shape that spans about 2 r pixels, centred at (cx, cy)."""
    x, y = _X - np.float32(cx), _Y - np.float32(cy)
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    elif shape == "triangle":  # apex up; the three half planes of an isosceles triangle
        distance = np.maximum(y - 0.85 * r, (2.0 * np.abs(x) - y - 1.05 * r) / np.sqrt(5.0))
    elif shape == "cross":
        arm = 0.34 * r
        bars = (np.maximum(np.abs(x) - a, np.abs(y) - b) for a, b in ((r, arm), (arm, r)))
        distance = np.minimum(*bars)
    else:
        raise AdapterError(f"unknown shape {shape!r}; known shapes are {SHAPES}")
    mask: Image = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return mask


def _rgb(colour: tuple[int, int, int]) -> Image:
    return np.array(colour, np.float32) / 255


def draw(scene: Scene, rng: np.random.Generator | None = None) -> Image:
    """The picture of a scene, float32 [32,32,3] in [0,1]; ``rng`` jitters position and size, None draws the canonical
    one.
    """

    def jitter(spread: float) -> float:
        return 0.0 if rng is None else float(rng.uniform(-spread, spread))

    image = np.broadcast_to(_rgb(BACKGROUNDS[scene.background]), (SIDE, SIDE, 3)).copy()
    middle = SIDE / 2
    if scene.size is not None:
        dx, dy = PLACES[scene.where]
        placed = [(scene.things[0], dx * OFFSET[scene.size], dy * OFFSET[scene.size], RADII[scene.size])]
    else:
        dx, dy = RELATIONS[scene.where]
        d = OFFSET["pair"]
        placed = [
            (scene.things[0], dx * d, dy * d, RADII["small"]),
            (scene.things[1], -dx * d, -dy * d, RADII["small"]),
        ]
    for thing, x, y, r in placed:
        mask = coverage(thing.shape, middle + x + jitter(0.5), middle + y + jitter(0.5), r + jitter(0.25))[..., None]
        image = image * (1 - mask) + mask * _rgb(COLOURS[thing.colour])
    return image.astype(np.float32)


@dataclass(frozen=True)
class Fit:
    shape: str
    cx: float
    cy: float
    r: float
    error: float


def fit_shape(mask: Array, radii: tuple[float, ...] | None = None) -> Fit:
    """The best shape for a soft mask [32,32]: a search over shape, radius and centre, scored by squared error; shape ""
    if none fits.
    """
    weight = np.asarray(mask, np.float32)
    total = float(weight.sum())
    if total < 4.0:  # fewer than four pixels are no shape
        return Fit("", SIDE / 2, SIDE / 2, 0.0, float("inf"))
    cx, cy = float((weight * _X).sum() / total), float((weight * _Y).sum() / total)
    best = Fit("", cx, cy, 0.0, float("inf"))
    for shape in SHAPES:
        x, y, step, at = cx, cy + (-0.28 * np.sqrt(total) * 0.5 if shape == "triangle" else 0.0), 2.0, None
        r = float(np.sqrt(total / {"circle": 3.14, "square": 3.1, "triangle": 1.8, "cross": 2.26}[shape]))
        while step >= 0.25:  # coordinate descent on (x, y, r), halving the step when nothing improves
            trials = [(x, y, r)] + [
                (x + step * i, y + step * j, max(1.0, r + step * k / 2))
                for i, j, k in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
            ]
            errors = [float(((coverage(shape, *t) - weight) ** 2).sum()) for t in trials]
            at = int(np.argmin(errors))
            x, y, r = trials[at]
            if at == 0:
                step /= 2
            if errors[at] < best.error:
                best = Fit(shape, x, y, r, errors[at])
    return best if best.error <= MISFIT * total else replace(best, shape="")


def _distance(pixels: Image, colour: Image) -> Image:
    """Euclidean, in RGB of [0,1]."""
    distance: Image = np.sqrt(((pixels - colour) ** 2).sum(-1))
    return distance


def _nearest(colour: Image, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((_rgb(palette[name]) - colour) ** 2).sum()))


def check(image: Array, scene: Scene) -> dict[str, bool]:
    """Which attributes of ``scene`` a picture [32,32,3] in [0,1] obeys.

    Keys: background; colour, shape, size, place for one object; colour, shape, colour_2, shape_2, relation for two. The
    background is read off the border, objects by their distance from it, shape, size and place by fitting the renderer.

    The bar: nothing counts by its nearest name alone. A background counts where the border is even (``EVEN``,
    ``BORDER``); what is said of an object counts where there is one, which is where a shape fits (``MISFIT``) and has a
    plain colour (``PLAIN``). So noise of any kind obeys nothing; a picture of another caption obeys what the two have
    in common.

    Args:
        image: [32,32,3] in [0,1].
        scene: What it is to show.

    Raises:
        AdapterError: A picture of another size or with NaN.
    """
    image = np.asarray(image, np.float32)
    if image.shape != (SIDE, SIDE, 3) or not np.isfinite(image).all():
        raise AdapterError(f"check: expected a finite picture of shape {(SIDE, SIDE, 3)}, found {image.shape}")
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = _nearest(np.median(border, axis=0), BACKGROUNDS)
    ground = _rgb(BACKGROUNDS[background])
    even = float((_distance(border, ground) < EVEN).mean()) >= BORDER
    marks = _check_single(image, scene, ground) if scene.size is not None else _check_pair(image, scene, ground)
    return {"background": even and background == scene.background, **marks}


def _check_single(image: Image, scene: Scene, ground: Image) -> dict[str, bool]:
    assert scene.size is not None
    difference = _distance(image, ground)
    core = difference > 0.6 * max(float(difference.max()), 0.2)
    colour = np.median(image[core], axis=0) if core.any() else ground
    name = _nearest(colour, COLOURS)
    toward = _rgb(COLOURS[name]) - ground
    found = fit_shape(np.clip(((image - ground) @ toward) / (toward @ toward), 0, 1))
    offset = np.array([found.cx - SIDE / 2, found.cy - SIDE / 2]) / OFFSET[scene.size]
    there = bool(found.shape) and float(_distance(colour, _rgb(COLOURS[name]))) < PLAIN
    return {
        "colour": there and name == scene.things[0].colour,
        "shape": there and found.shape == scene.things[0].shape,
        "size": there and (found.r > sum(RADII.values()) / 2) == (scene.size == "large"),
        "place": there and bool(np.abs(offset - PLACES[scene.where]).max() < 0.5),
    }


def _check_pair(image: Image, scene: Scene, ground: Image) -> dict[str, bool]:
    palette = np.stack([*(_rgb(value) for value in COLOURS.values()), ground])
    nearest = ((image[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    masks = [nearest == list(COLOURS).index(thing.colour) for thing in scene.things]
    first, second = (fit_shape(mask) for mask in masks)
    there = [bool(fit.shape) and int(mask.sum()) >= VISIBLE for fit, mask in zip((first, second), masks, strict=True)]
    apart = float(np.dot(RELATIONS[scene.where], (first.cx - second.cx, first.cy - second.cy)))
    return {
        "colour": there[0],
        "colour_2": there[1],
        "shape": there[0] and first.shape == scene.things[0].shape,
        "shape_2": there[1] and second.shape == scene.things[1].shape,
        "relation": all(there) and apart > OFFSET["pair"],
    }
