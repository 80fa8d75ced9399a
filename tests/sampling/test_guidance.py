"""One function guides: what it asks of a model, in which rows, and what becomes of the answers."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.guidance import Guidance, asked, guided, guided_rows, sides

SHAPE = (4, 6, 2)


def conditioning(*values):
    return Conditioning(value=mx.array(values, mx.float32))


class Model:
    """Predicts the value of each row's conditioning and the first number of its latent; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, latent, read, sigma):
        self.asked.append(
            (latent[:, 0, 0, 0].tolist(), {name: array.tolist() for name, array in {**read}.items()}, sigma)
        )
        return mx.broadcast_to((read["value"] + 100 * latent[:, 0, 0, 0])[:, None, None, None], latent.shape)


LATENT = mx.broadcast_to(mx.array([1.0, 2.0])[:, None, None, None], (2, *SHAPE))
TEXT, OTHER = conditioning(5.0, 6.0), conditioning(2.0, 3.0)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_linear_for_any_weight(weight, alone):
    found = guided(Model(), LATENT, 0.5, TEXT, OTHER, Guidance(weight, alone=alone))
    assert found.shape == LATENT.shape
    np.testing.assert_allclose(np.array(found[:, 1, 1, 1]), [102 + 3 * weight, 203 + 3 * weight], rtol=1e-6)


@pytest.mark.parametrize(("weight", "value"), [(0.0, [2, 3]), (1.0, [5, 6])])
def test_pure_sides_cost_one_pass(weight, value):
    model = Model()
    guided(model, LATENT, 0.5, TEXT, OTHER, Guidance(weight))
    assert model.asked == [([1, 2], {"value": value}, 0.5)]


def test_two_sides_share_a_pass_the_prompted_rows_first():
    model = Model()
    guided(model, LATENT, 0.5, TEXT, OTHER, Guidance(2.0))
    assert model.asked == [([1, 2, 1, 2], {"value": [5, 6, 2, 3]}, 0.5)]


def test_rows_that_cannot_be_joined_are_asked_one_after_the_other():
    """Also where the two sides are of different shapes."""
    shapes = []

    def predict(latent, read, sigma):
        shapes.append(read["tokens"].shape)
        return latent * read["tokens"].shape[1]

    text, other = Conditioning(tokens=mx.zeros((2, 7, 3))), Conditioning(tokens=mx.zeros((2, 1, 3)))
    found = guided(predict, LATENT, 0.5, text, other, Guidance(2.0, alone=True))
    assert shapes == [(1, 7, 3)] * 2 + [(1, 1, 3)] * 2
    np.testing.assert_allclose(np.array(found), (1 + 2 * 6) * np.array(LATENT))
    with pytest.raises(AdapterError, match="cannot be joined"):
        guided(predict, LATENT, 0.5, text, other, Guidance(2.0))


def test_an_embedded_weight_is_read_and_asked_once():
    model = Model()
    found = guided(model, LATENT, 0.5, TEXT, OTHER, Guidance(3.5, kind="embedded"))
    assert model.asked == [([1, 2], {"value": [5, 6], "guidance": [3.5, 3.5]}, 0.5)]
    np.testing.assert_allclose(np.array(found[:, 0, 0, 0]), [105, 206])
    assert set(TEXT.keys()) == {"value"}


@pytest.mark.parametrize("alone", [False, True])
def test_side_by_side_rows_are_the_same_rows_picture_by_picture(alone):
    guidance = Guidance(2.0, alone=alone)
    calls = asked(LATENT, TEXT, OTHER, guidance, side_by_side=True)
    assert len(calls) == (4 if alone else 1)
    latents = mx.concatenate([latent for latent, _ in calls])[:, 0, 0, 0].tolist()
    values = mx.concatenate([read["value"] for _, read in calls]).tolist()
    assert (latents, values) == ([1, 1, 2, 2], [5, 2, 6, 3])


@pytest.mark.parametrize(("cfg", "expected"), [(0, (False,)), (1, (True,)), (0.5, (True, False)), (7, (True, False))])
def test_guidance_asks_for_what_counts(cfg, expected):
    assert sides(Guidance(cfg)) == expected
    assert sides(Guidance(cfg, kind="embedded")) == (True,)


def test_rows_come_side_after_side_or_picture_by_picture():
    two, one = Guidance(2), Guidance(1)
    assert guided_rows([4, 7], two) == [(4, True), (7, True), (4, False), (7, False)]
    assert guided_rows([4, 7], two, side_by_side=True) == [(4, True), (4, False), (7, True), (7, False)]
    assert guided_rows([4, 7], one) == guided_rows([4, 7], one, side_by_side=True) == [(4, True), (7, True)]


@pytest.mark.parametrize("cfg", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["classifier-free", "embedded"])
def test_impossible_weights_are_refused(cfg, kind):
    with pytest.raises(AdapterError, match="cfg weight"):
        Guidance(cfg, kind=kind)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 3.5, "kind": "embedded"}, "guidance embedded; leave it out"),
        ({"weight": 1.0, "kind": "none"}, "guidance none; leave it out"),
        ({"weight": 1.0}, "a cfg weight of 1, which is no guidance; leave it out, or choose another weight"),
    ],
)
def test_a_negative_prompt_that_nobody_reads_is_refused(given, message):
    with pytest.raises(AdapterError, match=message):
        Guidance(**given, negative="fog")


def test_a_model_without_guidance_has_no_weight():
    assert sides(Guidance(1.0, kind="none")) == (True,)
    with pytest.raises(AdapterError, match="no guidance, found a cfg weight of 4; leave it out"):
        Guidance(4.0, kind="none")
    with pytest.raises(AdapterError, match="found 'half'"):
        Guidance(1.0, kind="half")


def test_latents_and_conditioning_have_as_many_rows():
    with pytest.raises(AdapterError, match="2 latents with a conditioning of 2 and 1 rows"):
        guided(Model(), LATENT, 0.5, TEXT, conditioning(0.0), Guidance(2.0))


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(2.0),
        Guidance(2.0, "fog"),
        Guidance(3.5, kind="embedded"),
        Guidance(1.0, kind="none"),
        Guidance(2.0, "fog", alone=True),
    ],
)
def test_facts_tell_all_and_the_usual_ones_are_those_of_earlier_releases(guidance):
    assert Guidance.of({**guidance.facts, "steps": 3}) == guidance
    assert Guidance(2.0).facts == {"cfg": 2.0}
    assert Guidance.of({"cfg": 2.0}) == Guidance(2.0)
