"""The checker agrees with the pictures that were drawn, notices what is wrong, and survives anything."""

from dataclasses import replace

import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.metrics.attributes import accuracy
from mlxquant.models.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    captions,
    check,
    draw,
    parse,
    sample_scene,
)

RNG = np.random.default_rng(0)
SCENES = [sample_scene(RNG) for _ in range(120)]
IMAGES = np.stack([draw(scene, RNG) for scene in SCENES])


def marks(images):
    return [check(image, scene) for image, scene in zip(images, SCENES, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_drawn_pictures_obey_their_captions(noise):
    images = np.clip(IMAGES + RNG.normal(0, noise, IMAGES.shape), 0, 1)
    assert accuracy(marks(images))["mean"] > 0.998


def wrong(scene, attribute):
    """A scene that differs in one attribute of its (first) object."""
    other = {"colour": list(COLOURS), "shape": list(SHAPES), "background": list(BACKGROUNDS)}
    thing = scene.things[0]
    if attribute == "background":
        return replace(scene, background=next(b for b in BACKGROUNDS if b != scene.background))
    if attribute in ("colour", "shape"):
        taken = {getattr(t, attribute) for t in scene.things}
        value = next(v for v in other[attribute] if v not in taken)
        return replace(scene, things=(replace(thing, **{attribute: value}), *scene.things[1:]))
    if attribute == "size":
        return replace(scene, size={"large": "small", "small": "large"}[scene.size])
    places = PLACES if attribute == "place" else RELATIONS
    return replace(scene, where=next(w for w in places if w != scene.where))


@pytest.mark.parametrize("attribute", ["background", "colour", "shape", "size", "place", "relation"])
def test_one_wrong_attribute_is_noticed(attribute):
    noticed = []
    for scene, image in zip(SCENES, IMAGES, strict=True):
        if attribute in check(image, scene):
            noticed.append(not check(image, wrong(scene, attribute))[attribute])
    assert len(noticed) > 30
    assert np.mean(noticed) > 0.99


@pytest.mark.parametrize(
    "image", [np.zeros((32, 32, 3)), np.ones((32, 32, 3)), RNG.random((32, 32, 3)), np.full((32, 32, 3), 0.49)]
)
def test_empty_and_random_pictures_do_not_pass(image):
    for scene in SCENES[:30]:
        marks = check(image, scene)
        assert not all(marks.values())
        assert not marks.get("colour") or not marks["shape"]


@pytest.mark.parametrize("grain", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.2, 0.35, 1.0])
def test_noise_obeys_nothing(grain, spread):
    """Once a third of it did: some pixels are nearest to any colour, and a mask of them has a centre and a radius."""
    rng = np.random.default_rng(grain)
    coarse = np.clip(0.5 + spread * rng.standard_normal((len(SCENES), 32 // grain, 32 // grain, 3)), 0, 1)
    assert accuracy(marks(coarse.repeat(grain, 1).repeat(grain, 2)))["mean"] < 0.01


def test_an_even_ground_is_a_background_and_nothing_else():
    grounds = np.stack([np.full((32, 32, 3), np.array(BACKGROUNDS[s.background]) / 255) for s in SCENES])
    shown = accuracy(marks(grounds))
    assert {kind for kind, share in shown.items() if share} == {"background", "mean"}
    assert shown["background"] == 1


def test_pictures_of_other_captions_obey_what_they_have_in_common():
    others = accuracy(marks(np.roll(IMAGES, 1, axis=0)))
    assert 0.1 < others["mean"] < 0.3


@pytest.mark.parametrize("image", [np.zeros((16, 16, 3)), np.full((32, 32, 3), np.nan)])
def test_impossible_pictures_are_refused(image):
    with pytest.raises(AdapterError, match="finite picture"):
        check(image, SCENES[0])


def test_captions_are_read_back():
    for scene in SCENES:
        assert parse(scene.caption.upper()) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a",
        "a cat",
        "a large red circle at left",
        "a huge red circle at left on white background",
        "a red circle left of a red square on white background",
        "a red circle beside a blue square on white background",
        "a large red circle at left on mauve background",
        "large red circle at left on white background a",
    ],
)
def test_other_captions_are_refused_with_the_grammar(caption):
    with pytest.raises(AdapterError, match="a SIZE COLOUR SHAPE PLACE on BACKGROUND background"):
        parse(caption)


def test_caption_lists_are_fixed_distinct_and_disjoint():
    train, held_out = captions(False, 100), captions(True, 300)
    assert len({*train, *held_out}) == 400
    assert captions(True, 50) == held_out[:50]
    shapes = [t.shape for c in held_out for t in parse(c).things]
    assert {s: shapes.count(s) > 50 for s in SHAPES} == dict.fromkeys(SHAPES, True)
