"""The picture of ranges: every layer has its panel, and the panel shows its numbers."""

import os

import numpy as np
import pytest
from PIL import Image

from mlxquant.errors import ArtifactError
from mlxquant.report.ranges import RangeCurves, _common, draw_ranges


def curves(count, steps=5, top=1.0):
    sigma = np.linspace(0.1, 1, steps)
    one = RangeCurves(sigma, -0.5 * sigma, 0.5 * sigma, -sigma, top * sigma)
    return {f"blocks.{i}.image.attn.q_proj": one for i in range(count)}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("count", "names"), [(1, ["r.png"]), (24, ["r.png"]), (25, ["r-1.png", "r-2.png"])])
def test_every_layer_has_a_panel_on_some_page(tmp_path, count, names):
    written = draw_ranges(curves(count), tmp_path / "r.png")
    assert sorted(os.listdir(tmp_path)) == names
    assert [path.name for path in written] == names
    for path in written:
        assert pixels(path).std() > 10


def test_pages_grow_with_their_panels(tmp_path):
    small, large = (pixels(draw_ranges(curves(count), tmp_path / f"{count}.png")[0]) for count in (4, 24))
    assert small.shape[1] == large.shape[1]
    assert small.shape[0] < large.shape[0] / 2


def test_the_extremes_are_drawn(tmp_path):
    near, far = (pixels(draw_ranges(curves(1, top=top), tmp_path / f"{top}.png")[0]) for top in (1.0, 9.0))
    assert np.abs(near - far).max() > 100


def test_one_timestep_is_visible(tmp_path):
    page = pixels(draw_ranges(curves(1, steps=1), tmp_path / "r.png")[0])
    assert (page[..., 2] - page[..., 0] > 80).any()  # the blue of the averaged range


def test_equal_numbers_give_equal_bytes(tmp_path):
    a, b = (draw_ranges(curves(3), tmp_path / name)[0].read_bytes() for name in ("a.png", "b.png"))
    assert a == b


def test_a_name_is_no_formula(tmp_path):
    (curve,) = curves(1).values()
    assert draw_ranges({"blocks.$_{$.$_{$.fc1": curve, "other.1.b": curve}, tmp_path / "r.png")[0].exists()


def test_common_parts_are_named_once():
    assert _common(["m.0.image.mlp.fc1", "m.1.text.mlp.fc2"]) == "m"
    assert _common(["m.0.image.mlp.fc1"]) == "m.0.image"
    assert _common(["a.b", "c.d"]) == ""


def test_unwritable_places_are_one_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        draw_ranges(curves(1), tmp_path / "none" / "r.png")
