"""Step 4: both tracks in one model, pictures and figures of what each part costs, a folder that other commands read,
and refusals.
"""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mlxquant as mq
from mlxquant.files.checked import file_digest, read_json, write_json
from mlxquant.grids.tables import ActivationTable
from mlxquant.layers import product
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.load_adaround_model import assemble
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.pipeline.apply import TrackFiles
from mlxquant.pipeline.quant_config import QuantConfig

from support.command_line import fail, succeed
from support.six_steps import analyze, cache, collect, draw, optimize, tiny_model
from support.tiny_pictures import tiny_adapter

PROMPT = "a large red circle at left on white background"
OTHER = "a small blue cross at top on pink background"


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with tiny_model():
        yield


def tier(table, bits):
    """The same ranges in other bits."""
    edge = 2.0 ** (table.bits.astype(float) - 1)
    low, step = table.shift - (edge * table.step)[:, None], table.step * (2 * edge - 1) / (2.0**bits - 1)
    shift = low + 2 ** (bits - 1) * step[:, None]
    return ActivationTable(
        table.sigma, step.astype(np.float32), shift.astype(np.float32), np.full_like(table.bits, bits)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both tracks: weights of 4 bits, weights of 8 bits rounded with a config, and two configs, one that uses every
    tier.
    """
    folder = tmp_path_factory.mktemp("made")
    draw(folder, 2, 3, "--cfg-weight", 2)
    cache(folder, 2)
    collect(folder, 2)
    analyze(folder, "--budget", 1e-9)
    eight = QuantConfig.read(folder / "activations" / "quant_config.json")
    plain = {path: tier(table, (4, 6, 8)[index % 3]) for index, (path, table) in enumerate(eight.plain.items())}
    replace(eight, plain=plain, smoothquant={}, migration={}).write(folder / "tiers.json")
    optimize(folder, folder / "w4", "--iters", 1)
    config = ("--quant-config", folder / "activations" / "quant_config.json")
    optimize(folder, folder / "w8", "--iters", 1, "--bits-w", 8, *config)
    return folder


def verb(made, out, weights="w4", config="activations/quant_config.json", prompts=(PROMPT,), *options):
    quant = () if config is None else ("--quant-config", made / config)
    texts = [part for text in prompts for part in ("--prompt", text)]
    return (
        "load-adaround-model",
        "--adaround-output",
        made / weights,
        *quant,
        *texts,
        "--num-steps",
        2,
        "--output-image",
        out,
        *options,
    )


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(float) / 255


def test_without_a_config_it_draws_v1_and_with_one_v2(made, tmp_path):
    facts, _ = succeed(*verb(made, tmp_path / "v1.png", config=None))
    assert {"output", "models", "seconds", "peak_bytes", "saved"} <= set(facts)
    assert (facts["output"], facts["models"], facts["saved"]) == (str(tmp_path / "v1.png"), {}, None)
    succeed(*verb(made, tmp_path / "v2.png"))
    v1, v2 = picture(tmp_path / "v1.png"), picture(tmp_path / "v2.png")
    assert v1.shape == (32, 32, 3)
    assert 0 < np.abs(v1 - v2).mean() < 0.02  # activations are quantized, to 8 bits
    for name, active in (("v1", False), ("v2", True)):
        model = assemble(
            mq.Model(tiny_adapter()), TrackFiles(made / "w4", made / "activations" / "quant_config.json"), active
        )
        expected = model.images([mq.Prompt(42, PROMPT)], 2)[0]
        np.testing.assert_allclose(picture(tmp_path / f"{name}.png"), np.clip(expected, 0, 1), atol=0.5 / 255 + 1e-6)
    assert sorted(os.listdir(tmp_path)) == ["v1.png", "v2.png"]


def test_several_prompts_are_side_by_side_with_seeds_counting_up(made, tmp_path):
    succeed(*verb(made, tmp_path / "two.png", "w4", None, (OTHER, PROMPT), "--seed", 6))
    succeed(*verb(made, tmp_path / "one.png", "w4", None, (PROMPT,), "--seed", 7))
    two = picture(tmp_path / "two.png")
    assert two.shape == (32, 64, 3)
    np.testing.assert_allclose(two[:, 32:], picture(tmp_path / "one.png"), atol=1.01 / 255)


def test_comparison_has_four_models_and_their_differences(made, tmp_path):
    facts, said = succeed(
        *verb(made, tmp_path / "a.png", "w4", "activations/quant_config.json", (PROMPT, OTHER), "--compare")
    )
    assert set(facts["models"]) == {"RTN", "V1", "V2"}
    page = picture(tmp_path / "a.png")
    cell, gap = 144, 10
    assert page.shape[1] == gap + 7 * (cell + gap)  # FP, RTN, V1, V2 and three differences
    columns = [page[90:220, gap + i * (cell + gap) : gap + i * (cell + gap) + cell] for i in range(7)]
    assert all(column.std() > 0.02 for column in columns[:4])
    assert len({column.tobytes() for column in columns}) == 7
    assert "against FP" in said
    assert not (tmp_path / "a.diff.json").exists()
    without, _ = succeed(*verb(made, tmp_path / "b.png", "w4", None, (PROMPT, OTHER), "--compare"))
    assert set(without["models"]) == {"RTN", "V1"}
    assert picture(tmp_path / "b.png").shape[1] == gap + 5 * (cell + gap)


def test_difference_statistics_are_those_of_the_pictures(made, tmp_path):
    facts, said = succeed(
        *verb(made, tmp_path / "a.png", "w4", "activations/quant_config.json", (PROMPT,), "--diff-stats")
    )
    report = read_json(tmp_path / "a.diff.json", "difference-statistics")
    assert [text for _, text in report["prompts"]] == [PROMPT]
    assert report["models"] == facts["models"]
    assert set(report["models"]) == {"RTN", "V1", "V2"}
    tracks = TrackFiles(made / "w4", made / "activations" / "quant_config.json")
    exact, v2 = (
        m.images([mq.Prompt(42, PROMPT)], 2)[0]
        for m in (mq.Model(tiny_adapter()), assemble(mq.Model(tiny_adapter()), tracks, active=True))
    )
    gap = np.abs(exact - v2)
    row = report["models"]["V2"]
    assert row["max_abs"] == pytest.approx(gap.max(), rel=1e-5)
    assert row["mean_abs"] == pytest.approx(gap.mean(), rel=1e-5)
    assert row["changed"] == pytest.approx((gap > 1 / 255).mean(), abs=1e-3)
    assert row["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(gap.astype(np.float64) ** 2)), abs=1e-3)
    for name in ("RTN", "V1", "V2"):
        assert any(
            line.startswith(name) and f"{report['models'][name]['psnr_db']:.2f}" in line for line in said.splitlines()
        )
    assert picture(tmp_path / "a.png").shape == (32, 32, 3)  # the picture is the last model's


def test_calibrated_weights_beat_rounding_and_eight_bits_cost_little(made, tmp_path):
    four, _ = succeed(*verb(made, tmp_path / "a.png", "w4", "activations/quant_config.json", (PROMPT,), "--diff-stats"))
    assert four["models"]["V1"]["psnr_db"] > four["models"]["RTN"]["psnr_db"] + 1
    assert abs(four["models"]["V1"]["psnr_db"] - four["models"]["V2"]["psnr_db"]) < 1
    eight, _ = succeed(
        *verb(made, tmp_path / "b.png", "w8", "activations/quant_config.json", (PROMPT,), "--diff-stats")
    )
    assert eight["models"]["V2"]["psnr_db"] > four["models"]["V2"]["psnr_db"] + 6


def test_v2_runs_on_integer_codes_of_every_tier(made, monkeypatch):
    multiply, seen = product.integer_matmul, set()

    def spy(x, weight, x_limit, weight_limit, meet):
        codes, whole = np.array(x), np.array(weight)
        np.testing.assert_array_equal(codes, np.rint(codes))
        np.testing.assert_array_equal(whole, np.rint(whole))
        assert codes.min() >= -x_limit
        assert codes.max() <= x_limit - 1
        assert np.abs(whole).max() <= weight_limit == 8
        seen.add(x_limit)
        return multiply(x, weight, x_limit, weight_limit, meet)

    monkeypatch.setattr(product, "integer_matmul", spy)
    model = assemble(mq.Model(tiny_adapter()), TrackFiles(made / "w4", made / "tiers.json"), active=True)
    config = QuantConfig.read(made / "tiers.json")
    found = {path: m for path, m in model.adapter.module.named_modules() if isinstance(m, QuantizedLinear)}
    assert {path for path, layer in found.items() if layer.table is not None} == set(config.plain)
    for path, table in config.plain.items():
        np.testing.assert_array_equal(found[path].table.bits, table.bits)
    model.images([mq.Prompt(1, PROMPT)], 3)
    assert seen == {8, 32, 128}  # 4, 6 and 8 bits
    seen.clear()
    assemble(mq.Model(tiny_adapter()), TrackFiles(made / "w4", made / "tiers.json"), active=False).images(
        [mq.Prompt(1, PROMPT)], 3
    )
    assert not seen


def test_a_saved_model_draws_the_same_picture(made, tmp_path):
    facts, said = succeed(*verb(made, tmp_path / "a.png", "w4", "tiers.json", (PROMPT,), "--save", tmp_path / "m"))
    assert facts["saved"] == str(tmp_path / "m")
    assert "bits per weight" in said
    generate = (
        "generate",
        "--model",
        tmp_path / "m",
        "--prompt",
        PROMPT,
        "--seed",
        42,
        "--steps",
        2,
        "--output",
        tmp_path / "b.png",
    )
    succeed(*generate)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    model = read_json(tmp_path / "m" / "model.json", "quantized-model")
    assert model["tracks"] == {
        "config.json": file_digest(made / "w4" / "config.json"),
        "quant_config.json": file_digest(made / "tiers.json"),
    }
    assert str(made) not in (tmp_path / "m" / "model.json").read_text()
    assert "--force" in fail(*verb(made, tmp_path / "c.png", "w4", "tiers.json", (PROMPT,), "--save", tmp_path / "m"))
    assert not (tmp_path / "c.png").exists()
    succeed(*verb(made, tmp_path / "c.png", "w4", None, (PROMPT,), "--save", tmp_path / "m", "--force"))
    loaded = mq.load(tmp_path / "m").layers.values()
    assert loaded
    assert all(layer.table is None for layer in loaded)  # V1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": (" ",)}, "--prompt is empty or missing"),
        ({"prompts": (PROMPT, "")}, "--prompt is empty or missing"),
        ({"prompts": ("a tabby cat sitting on a wooden table",)}, "cannot draw 'a tabby cat"),
        ({"weights": "w5"}, "run 'mlxquant adaround-optimize --output-dir"),
        ({"config": "none.json"}, "No such file"),
        ({"config": "manifest.json"}, "expected a file of kind 'quant-config'"),
        ({"weights": "w8", "config": None}, "none was given; pass that one with --quant-config"),
        ({"weights": "w8", "config": "tiers.json"}, "were rounded with a quantization config of sha256"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(made, tmp_path, change, message):
    assert message in fail(*verb(made, tmp_path / "deep" / "a.png", **change))
    assert not (tmp_path / "deep" / "a.png").exists()


def test_other_models_and_other_weights_are_refused(made, tmp_path, monkeypatch):
    assert "is of model 'mmdit-shapes', not of 'sd3-medium'" in fail(
        *verb(made, tmp_path / "a.png"), "--model", "sd3-medium"
    )

    def other(cls, place=""):
        adapter = tiny_adapter()
        adapter.module.final_layer.linear.weight = adapter.module.final_layer.linear.weight + 1
        return adapter

    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(other))
    assert "the learned weights are of mmdit-shapes with other weights" in fail(*verb(made, tmp_path / "a.png"))
    assert os.listdir(tmp_path) == []


def test_a_config_of_other_trajectories_is_refused(made, tmp_path):
    config = QuantConfig.read(made / "activations" / "quant_config.json")
    config.facts["calibration"] = "d" * 64
    config.write(tmp_path / "quant_config.json")
    assert "come from different calibration data" in fail(
        *verb(made, tmp_path / "a.png", config=tmp_path / "quant_config.json")
    )
    assert not (tmp_path / "a.png").exists()


def test_unfinished_and_damaged_weights_are_refused(made, tmp_path):
    shutil.copytree(made / "w4", tmp_path / "w4")
    block = tmp_path / "w4" / "weights" / "mm1.npz"
    block.write_bytes(block.read_bytes()[:-1])
    assert "mm1.npz: sha256" in fail(*verb(tmp_path, tmp_path / "a.png", config=None))
    data = read_json(tmp_path / "w4" / "config.json", "adaround-weights")
    del data["kind"], data["version"], data["files"]["weights/mm1.npz"]
    write_json(tmp_path / "w4" / "config.json", "adaround-weights", {**data, "complete": False})
    assert "not finished (1 files so far); run 'mlxquant adaround-optimize' again" in fail(
        *verb(tmp_path, tmp_path / "a.png", config=None)
    )
    assert os.listdir(tmp_path) == ["w4"]


def test_places_that_cannot_be_written_are_refused(made, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder" in fail(*verb(made, tmp_path))
    assert "part of the path is a file" in fail(*verb(made, tmp_path / "file" / "a.png"))
    assert "part of the path is a file" in fail(*verb(made, tmp_path / "a.png"), "--save", tmp_path / "file" / "m")
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_of_prompts_is_drawn_and_measured(made, tmp_path):
    (tmp_path / "p.txt").write_text(f"3\t{PROMPT}\n4\t{OTHER}\n5\t{PROMPT}\n")
    arguments = [
        "--adaround-output",
        made / "w4",
        "--prompts",
        tmp_path / "p.txt",
        "--num-prompts",
        2,
        "--num-steps",
        2,
    ]
    facts, _ = succeed("load-adaround-model", *arguments, "--diff-stats", "--output-image", tmp_path / "a.png")
    report = read_json(tmp_path / "a.diff.json", "difference-statistics")
    assert report["prompts"] == [[3, PROMPT], [4, OTHER]]
    assert set(facts["models"]) == {"RTN", "V1"}


def test_quantize_refuses_foreign_tracks_before_it_calibrates(made, tmp_path):
    def quantize(recipe, weights, *options):
        return (
            "quantize",
            "--model",
            "mmdit-shapes",
            "--recipe",
            recipe,
            "--adaround-output",
            made / weights,
            *options,
        )

    out = ("--out", tmp_path / "m", "--num-prompts", 1, "--steps", 1)
    assert "is in format w4, the recipe wants w3" in fail(*quantize("gptq-w3a8", "w4", *out))
    kept = ("--override", "@attention=keep")
    assert "the recipe wants it kept as it is" in fail(*quantize("gptq-w4a8", "w4", *kept, *out))
    assert "run 'mlxquant adaround-optimize --output-dir" in fail(*quantize("gptq-w4a8", "w5", *out))
    assert os.listdir(tmp_path) == []
    _, said = succeed(*quantize("gptq-w4a8", "w4", *out))
    assert "without --quant-config the blocks keep unquantized activations" in said
    report = read_json(tmp_path / "m" / "model.json", "quantized-model")["stages"][1]["layers"]
    assert {facts["activation"] for facts in report.values()} == {16}
