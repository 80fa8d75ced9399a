"""Pictures of tensors: what is drawn is what is stored, and every kind of file has its pictures."""

import json
import os
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxquant as mq
from mlxquant.contents import views as views_module
from mlxquant.contents.reader import read_contents
from mlxquant.contents.views import stride_for, views
from mlxquant.report import tensor_plots
from mlxquant.report.tensor_plots import Panel, draw_sheets, draw_tensor, pooled, scale
from mlxquant.visualize import file_names

from support.command_line import fail, succeed
from support.contents_samples import write_everything


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_everything(tmp_path_factory)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("graph", ["histogram", "matrix"])
@pytest.mark.parametrize(
    ("path", "weight", "kinds"),
    [
        ("model", "*blocks.0.image*.q_proj.*", ["weight", "codes", "array"]),
        ("weights", "*blocks.0.image*.q_proj.*", ["weight", "codes"]),
        ("calib/activations", "*blocks.0.image*.fc2.input", ["activation"]),
        ("calib/activations/quant_config.json", "all", ["table", "table"]),
        ("calib/adaround_cache", "samples/0000_000/mm0*", ["array", "array"]),
        ("work/calibration/0000.safetensors", "latents", ["array"]),
    ],
)  # fmt: skip
def test_every_kind_has_pictures(made, tmp_path, path, weight, kinds, graph):
    facts, _ = succeed("visualize", made / path, "--weight", weight, "--graph", graph, "--out", tmp_path / "v")
    assert [tensor["kind"] for tensor in facts["tensors"]] == kinds
    assert len(set(facts["files"])) == len(kinds)
    assert sorted(os.listdir(tmp_path / "v")) == sorted([*facts["files"], "report.json"])
    for name in facts["files"]:
        assert pixels(tmp_path / "v" / name).std() > 5


def test_a_sheet_has_all(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_plots, "PER_SHEET", 2)
    facts, said = succeed(
        "visualize", made / "model", "--weight", "*.0.image*[qkv]_proj.codes", "--sheet", "--out", tmp_path / "v"
    )
    assert len(facts["tensors"]) == 3
    assert facts["files"] == ["sheet-1.png", "sheet-2.png"]
    assert "2 pictures of 3 tensors" in said
    assert json.loads((tmp_path / "v" / "report.json").read_text())["kind"] == "tensor-pictures"


def test_folders_are_not_replaced_unasked(made, tmp_path):
    arguments = ("visualize", made / "work" / "calibration" / "0000.safetensors", "--out", tmp_path / "v")
    succeed(*arguments)
    assert "--force" in fail(*arguments, code=1)
    succeed(*arguments, "--force")


def test_names_that_mean_nothing_are_one_clear_error(made, tmp_path):
    assert "no tensor is called 'zzz*'; it has" in fail(
        "visualize", made / "model", "--weight", "zzz*", "--out", tmp_path / "v", code=1
    )
    said = fail(
        "visualize", made / "calib" / "activations" / "layer_temporal_analysis.json", "--out", tmp_path / "v", code=1
    )
    assert "holds no tensors that can be drawn" in said
    assert not (tmp_path / "v").exists()


def test_views_are_the_model_s_numbers(made):
    found = {view.name: view for view in views(read_contents(made / "model"))}
    for path, layer in mq.load(made / "model").layers.items():
        codes = found[f"{path}.codes"]
        assert np.array_equal(found[f"{path}.weight"].matrix(), np.array(layer.dequantized()))
        assert np.array_equal(codes.matrix(), layer.codes().astype(np.float32) - layer.format.zero_code)
        assert codes.levels == (-layer.format.zero_code, layer.format.zero_code - 1)
    steps = found["activations.step"].matrix()
    tables = [layer.table for layer in mq.load(made / "model").layers.values() if layer.table is not None]
    assert np.array_equal(np.sort(steps, axis=0), np.sort(np.stack([table.step[::-1] for table in tables]), axis=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_scales_that_are_no_numbers_are_drawn_as_such(made, monkeypatch, value):
    stored = next(iter(read_contents(made / "model").layers))
    rows = stored._rows("scales", 1)
    rows[0] = value
    monkeypatch.setattr(type(stored), "_rows", lambda self, name, stride: rows)
    weight = stored.weight()
    assert not np.isfinite(weight[0]).all()
    assert np.isfinite(weight[1:]).all()


def test_inputs_run_from_noise_to_picture(made):
    contents = read_contents(made / "calib" / "activations")
    view = views(contents)[0]
    stats, path = contents.statistics, view.name.removesuffix(".input")
    assert [label for label, _ in view.samples()] == [
        f"sigma {sigma:.3g}" for sigma in sorted(stats.sigmas, reverse=True)
    ]
    largest = np.abs(np.stack([stats.ranges(path).least, stats.ranges(path).most])).max(0)
    assert np.array_equal(view.matrix(), largest[::-1])


def test_very_large_tensors_are_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(views_module, "LARGEST", 256)
    values = mx.arange(1024.0).reshape(64, 16)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": values})
    (view,) = views(read_contents(tmp_path / "a.safetensors"))
    assert np.array_equal(view.matrix(), np.array(values)[::4])
    assert view.note.endswith("every 4th row")
    assert stride_for(()) == stride_for((4, 4)) == 1


def test_pooling_keeps_the_largest_magnitude():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((100, 37)).astype(np.float32)
    matrix[50, 20], matrix[3, 3] = -40, np.nan
    small = pooled(matrix, 10)
    assert small.shape == (10, 10)
    assert np.nanmin(small) == -40
    assert np.isnan(small).sum() == 1
    edges = [*np.linspace(0, 37, 10, endpoint=False).astype(int), 37]
    blocks = [matrix[r : r + 10, c:d] for r in range(0, 100, 10) for c, d in pairwise(edges)]
    expected = [block.flat[np.abs(block).argmax()] for block in blocks]
    assert np.array_equal(small.reshape(-1), expected, equal_nan=True)
    assert pooled(matrix, 200) is matrix


@pytest.mark.parametrize(
    ("values", "levels", "limits"),
    [
        ([-3, 0, 7], (-8, 7), (-8, 8)),
        ([-1.0, 2.0], None, (-2, 2)),
        ([1.0, 5.0], None, (1, 5)),
        ([0.0, 0.0], None, (0, 1)),
        ([0.1, 90], None, (0.1, 90)),
    ],
)
def test_zero_is_white_where_signs_differ(values, levels, limits):
    found = scale(np.array(values, float), levels)
    assert (found.vmin, found.vmax) == pytest.approx(limits, rel=0.01)


@pytest.mark.parametrize("values", [[np.nan, np.inf], [1.0, 1.0], [np.nan, 1.0, -2.0], [3.0]])
def test_odd_tensors_are_drawn(tmp_path, values):
    values = np.array(values, np.float32)
    histogram = draw_tensor(Panel("t", "n", samples=[("", values)]), tmp_path / "h.png")
    heat = draw_sheets([Panel("t", "n", matrix=values[None])] * 2, tmp_path / "m.png")
    assert [pixels(path).shape[2] for path in (histogram, *heat)] == [3, 3]


@pytest.mark.parametrize("name", ["a$\\frac$", "x$_{$", "$", "a\nb", ""])
def test_a_name_is_no_formula(tmp_path, name):
    assert draw_tensor(Panel(name, "$_{$", samples=[("", np.ones(3))]), tmp_path / "h.png").exists()


def test_codes_have_a_bar_each(tmp_path):
    many = draw_tensor(Panel("t", "n", samples=[("", np.array([-8, 7]))], levels=(-8, 7)), tmp_path / "h.png")
    blue = (pixels(many)[..., 2] - pixels(many)[..., 0] > 60).any(0).nonzero()[0]
    assert blue.max() - blue.min() > 500  # a bar at either end


def test_file_names_are_distinct_and_safe():
    assert file_names(["a.b", "a/b", "A_b", "..", "a:b"], "matrix") == [
        "a.b.matrix.png", "a_b.matrix.png", "A_b~2.matrix.png", ".matrix.png", "a_b~3.matrix.png",
    ]  # fmt: skip
