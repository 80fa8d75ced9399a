"""Whole pipelines of mflux: named, loaded, quantized and written as folders that mflux runs."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.api.pipeline_files import load_pipeline, save_pipeline
from mlxquant.api.pipelines import quantize_pipeline
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, ExportError
from mlxquant.exporters.pipelines import write_pipeline
from mlxquant.layers.attention import find_quantized_attentions
from mlxquant.models.mflux.components import _predicate, spine
from mlxquant.models.mflux.names import MfluxName, is_mflux
from mlxquant.models.mflux.pipeline import MfluxPipeline
from mlxquant.recipes.grammar import parse_recipe

from support.command_line import fail, succeed
from support.mflux_checkpoints import FAMILIES, small_models
from support.mflux_quantized import CALIBRATION, DRAWN, SIZE, dense, drawn, quantized

pytestmark = [pytest.mark.mflux, pytest.mark.slow]
AS_ONE = ("moss-image-sft", "qwen-image-2.1")
"""Calibrated as one: MOSS-Image skips a block where there is no prompt, and Qwen-Image 2.1 calls methods of its own."""
PURPOSES = ("transformer", "text", "decoder")


@pytest.mark.parametrize("name", FAMILIES)
def test_mflux_loads_the_folder_and_draws_what_our_model_draws(name):
    done = quantized(name)
    with small_models():
        theirs = MfluxPipeline.load(str(done.out), quantized=True)
    layers = [layer for one in theirs.components for _, layer in one.module.named_modules()]
    assert any(type(layer) is nn.QuantizedLinear for layer in layers)
    assert not any(type(layer).__module__.startswith("mlxquant") for layer in layers)
    np.testing.assert_allclose(drawn(theirs), done.after, atol=1.1 / 255)
    assert np.abs(done.after - done.before).mean() > 0.5 / 255  # it is quantized


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_says_what_became_of_it(name):
    done = quantized(name)
    purposes = {one.name: one.purpose for one in done.pipeline.components}
    rows = {purpose: [one for one in done.report.components if purposes[one.name] == purpose] for purpose in PURPOSES}
    assert all(row.recipe == "" and row.after == row.before for row in rows["decoder"])
    assert rows["text"]
    assert all(8.4 < row.bits_per_weight < 9.4 for row in rows["text"])
    assert rows["transformer"]
    for row in rows["transformer"]:
        kept = [one for one in row.report.sizes.kept if one.kind == "Linear"]
        assert 4.5 < row.bits_per_weight < (12 if kept else 8)
        assert {one.reason for one in kept} <= {"mflux reads it unquantized"}
        assert (row.report.whole == "") == (name not in AS_ONE)
    assert "all" in str(done.report)
    assert ("kept" in str(done.report)) == bool(rows["decoder"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_are_as_mflux_reads_them(name):
    done = quantized(name)
    for component in done.pipeline.components:
        folder = done.out / component.folder
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        arrays = {}
        for file in sorted(set(index["weight_map"].values())):
            found, metadata = mx.load(str(folder / file), return_metadata=True)
            assert metadata["mflux_version"] == "0.24.0"
            arrays |= found
        assert arrays.keys() == index["weight_map"].keys()
        known = done.pipeline.dtypes[component.name]
        for path, value in arrays.items():
            packed = path.endswith((".scales", ".biases")) or path not in known
            assert value.dtype == (mx.bfloat16 if packed else known[path] if value.dtype != mx.uint32 else mx.uint32)
        level = "8" if done.pipeline.float8 else "4"  # whatever most of its own layers have
        assert index["metadata"]["quantization_level"] == ("None" if component.purpose == "decoder" else level)
    facts = json.loads((done.out / "mflux_model.json").read_text())
    assert MfluxName.of(str(done.out)).key == name == (facts["base_model"] or facts["model_name"])


def test_the_predicate_of_a_family_is_asked_as_mflux_asks_it():
    linear, norm = nn.Linear(64, 64), nn.RMSNorm(64)
    two, three = _predicate(lambda path, module: path == "a"), _predicate(lambda path, module, bits: {"bits": bits})
    assert [two("a", linear), two("b", linear), two("a", norm)] == [True, False, False]
    assert three("a", linear) is True


def test_what_mflux_does_not_take_quantized_stays(monkeypatch):
    def refuses(asked):
        return lambda path, layer: hasattr(layer, "to_quantized") and "feed_forward" not in path

    monkeypatch.setattr("mlxquant.models.mflux.components._predicate", refuses)
    done = quantized.__wrapped__("z-image-turbo")
    layers = done.facts["layers"]
    assert layers["transformer"] > 0
    written = json.loads((done.out / "export.json").read_text())["layers"]["transformer"]
    assert not any("feed_forward" in path for path in written)
    kept = {one.reason for one in done.report.components[1].report.sizes.kept}
    assert "mflux reads it unquantized" in kept
    with small_models():
        theirs = MfluxPipeline.load(str(done.out), quantized=True)
    np.testing.assert_allclose(drawn(theirs), done.after, atol=1.1 / 255)


@pytest.mark.parametrize(
    "name",
    [
        "schnell",
        "z-image-turbo",
        "flux2-klein-4b",
        "qwen-image",
        "ernie-image-turbo",
        "flux3-image-klein",
        "ideogram-4-fp8",
        "ming-image-design",
    ],
)
def test_layers_have_bits_of_their_own(name):
    done = quantized(name, "mixed-w4a16-g64")
    written = json.loads((done.out / "export.json").read_text())["layers"]["transformer"]
    assert len({one["bits"] for one in written.values()}) > 1
    with small_models():
        theirs = MfluxPipeline.load(str(done.out), quantized=True)
    np.testing.assert_allclose(drawn(theirs), done.after, atol=1.1 / 255)


def test_text_encoders_are_calibrated_on_what_they_read():
    done = quantized("qwen-image", text_recipe="gptq-w4a16-g64")
    (text,) = [one for one in done.report.components if one.name == "text_encoder"]
    assert text.recipe == "gptq-w4a16-g64-bf16"
    assert text.report.calls == 2 * len(CALIBRATION)  # the prompts, and the empty one of guidance
    assert text.report.blocks


def test_a_folder_of_ours_keeps_integer_inputs(tmp_path):
    folder = dense("schnell")
    with small_models():
        pipeline = MfluxPipeline.load(str(folder))
        report = quantize_pipeline(pipeline, CALIBRATION, "gptq-w8a8", steps=2, size=SIZE)
        picture = drawn(pipeline)
        with pytest.raises(ExportError, match=r"^transformer: .* static activation scales"):
            write_pipeline(pipeline, tmp_path / "mflux")
        assert not (tmp_path / "mflux").exists()
        save_pipeline(pipeline, report, tmp_path / "ours", {"what": "nothing"})
        save_pipeline(pipeline, report, tmp_path / "ours", {"what": "a test"}, force=True)
        again = load_pipeline(tmp_path / "ours")
    tables = [layer.table for _, layer in again.pipeline.transformer.named_modules() if hasattr(layer, "table")]
    assert max(len(table.sigma) for table in tables if table is not None) == 2  # an entry a step
    np.testing.assert_array_equal(drawn(again), picture)
    file = tmp_path / "ours" / "transformer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with small_models(), pytest.raises(ArtifactError, match=r"transformer\.safetensors: is missing, or is not what"):
        load_pipeline(tmp_path / "ours")


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    folder, work = dense("z-image-turbo"), tmp_path / "work"
    arguments = {"steps": 1, "size": SIZE, "work": work}

    class Stopped(Exception):  # noqa: N818
        pass

    def stops(items, label):
        if label == "layers.1: rounding":
            raise Stopped
        return items

    with small_models():
        with pytest.raises(Stopped):
            quantize_pipeline(
                MfluxPipeline.load(str(folder)), CALIBRATION, "rtn-w4a16-g64", **arguments, progress=stops
            )
        assert any(work.rglob("*.safetensors"))
        first, second = MfluxPipeline.load(str(folder)), MfluxPipeline.load(str(folder))
        quantize_pipeline(first, CALIBRATION, "rtn-w4a16-g64", **arguments)
        quantize_pipeline(second, CALIBRATION, "rtn-w4a16-g64", **{**arguments, "work": tmp_path / "fresh"})
        write_pipeline(first, tmp_path / "one")
        write_pipeline(second, tmp_path / "two")
    names = [str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_lora_is_baked_in_before(tmp_path):
    folder = dense("z-image-turbo")
    with small_models():
        plain = MfluxPipeline.load(str(folder))
        path, layer = next(
            (path, layer)
            for path, layer in plain.pipeline.transformer.named_modules()
            if path.endswith("layers.0.attention.to_q")
        )
        rows, columns = layer.weight.shape
        file = tmp_path / "style.safetensors"
        mx.save_safetensors(
            str(file),
            {
                f"diffusion_model.{path}.lora_A.weight": 0.3 * mx.random.normal((4, columns)),
                f"diffusion_model.{path}.lora_B.weight": 0.3 * mx.random.normal((rows, 4)),
            },
        )
        styled = MfluxPipeline.load(str(folder), [(str(file), 0.5)])
        changed = dict(styled.pipeline.transformer.named_modules())[path]
        assert type(changed) is nn.Linear
        assert mx.abs(changed.weight - layer.weight).max().item() > 0.01
        save = quantize_pipeline(styled, CALIBRATION[:1], "rtn-w8a16-g64", steps=1, size=SIZE)
        assert save.components
        write_pipeline(styled, tmp_path / "out")
    (lora,) = json.loads((tmp_path / "out" / "mflux_model.json").read_text())["loras"]
    assert lora["source"] == "style.safetensors"
    assert lora["scale"] == 0.5


def test_names(tmp_path):
    assert MfluxName.of("mflux:zimage-turbo") == MfluxName("z-image-turbo")
    assert MfluxName.of("mflux:dev@Freepik/flux.1-lite-8B") == MfluxName("dev", "Freepik/flux.1-lite-8B")
    assert str(MfluxName("dev", "a/b")) == "mflux:dev@a/b"
    assert MfluxName.of("mflux:black-forest-labs/FLUX.1-dev").key == "dev"
    (tmp_path / "mflux_model.json").write_text('{"base_model": "dev", "model_name": "mine"}')
    assert is_mflux(str(tmp_path))
    assert MfluxName.of(str(tmp_path)) == MfluxName("dev", str(tmp_path))
    assert not is_mflux("mmdit-shapes")


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("mflux:mydevice", AdapterError, "mflux has no model 'mydevice'; did you mean dev"),
        ("mflux:z-imag", AdapterError, "did you mean z-image"),
        ("mflux:dev@", AdapterError, "nothing stands behind '@'"),
        ("mflux:dev@./missing", ArtifactError, "missing: no such folder; expected one with the weights of dev"),
        ("mflux:lens-turbo", AdapterError, "cannot be written as a folder"),
        ("mflux:dev-fill", AdapterError, "draws from an image and a mask"),
    ],
)
def test_wrong_names_are_one_clear_error(reference, kind, words):
    with pytest.raises(kind) as said:
        MfluxName.of(reference)
    assert words in str(said.value)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    folder = dense("z-image-turbo")
    other = dense("qwen-image")

    def refused(reference, words, **options):
        with small_models(), pytest.raises(ArtifactError) as said:
            MfluxPipeline.load(reference, **options)
        assert words in str(said.value), str(said.value)

    refused(f"mflux:z-image-turbo@{other}", "z-image-turbo")
    shutil.copytree(folder, tmp_path / "missing")
    index = tmp_path / "missing" / "transformer" / "model.safetensors.index.json"
    file = index.parent / "0.safetensors"
    arrays, metadata = mx.load(str(file), return_metadata=True)
    gone = sorted(arrays)[0]
    mx.save_safetensors(str(file), {name: value for name, value in arrays.items() if name != gone}, metadata)
    facts = json.loads(index.read_text())
    del facts["weight_map"][gone]
    index.write_text(json.dumps(facts))
    refused(str(tmp_path / "missing"), f"1 tensors are missing, such as {gone}")
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "transformer" / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(str(tmp_path / "cut"), "mflux stopped with RuntimeError: ")
    refused(str(quantized("z-image-turbo").out), "quantized already, to 4 bits")
    (tmp_path / "none").mkdir()
    refused(f"mflux:z-image-turbo@{tmp_path / 'none'}", "No safetensors files found")
    (tmp_path / "unnamed").mkdir()
    refused(str(tmp_path / "unnamed"), "holds no mflux_model.json")
    (tmp_path / "unnamed" / "mflux_model.json").write_text("{")
    refused(str(tmp_path / "unnamed"), "is damaged")


def test_a_pipeline_is_told_only_what_it_takes():
    done = quantized("flux2-klein-4b")
    with small_models():
        with pytest.raises(AdapterError, match="takes no negative; leave it out"):
            done.pipeline.draw(DRAWN, 1, size=SIZE, negative="fog")
        with pytest.raises(CalibrationError, match="there are no prompts"):
            quantize_pipeline(done.pipeline, [], "rtn-w8a16-g64")


def test_fibo_is_told_captions():
    fibo, other = quantized("fibo").pipeline, quantized("schnell").pipeline
    assert fibo._said('a "red" circle') == '{"short_description": "a \\"red\\" circle"}'
    assert fibo._said('{"objects": []}') == '{"objects": []}'
    assert other._said("a red circle") == "a red circle"


def test_the_spine_is_what_holds_most():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
            self.head = nn.Linear(4, 4)

    text = Text()
    assert [path for path, _ in spine(text)] == ["", "model"]


def test_on_the_command_line(tmp_path):
    folder, size = dense("schnell"), ["--steps", 2, "--size", 64]
    picture, out, ours = tmp_path / "picture.png", tmp_path / "schnell-out", tmp_path / "ours"
    quantizes = ["quantize", "--model", folder, "--num-prompts", 1, *size]
    draws = ["generate", "--prompt", "a red circle", "--output", picture, *size]
    with small_models():
        facts, said = succeed(*quantizes, "--recipe", "gptq-w4a16-g64", "--out", out)
        assert facts["target"] == "mflux"
        assert "t5_encoder" in said
        assert "mflux runs it with --model" in said
        facts, _ = succeed(*draws, "--model", out, "--compare", f"mflux:schnell@{folder}")
        assert facts["psnr_db"] > 15
        assert picture.stat().st_size > 1000
        facts, _ = succeed(*quantizes, "--recipe", "rtn-w8a8", "--text-recipe", "keep", "--out", ours)
        assert facts["target"] == "mlxquant"
        succeed(*draws, "--model", ours)
        plain = tmp_path / "plain"
        succeed("export", "--model", ours, "--target", "mflux", "--drop-activations", "--out", plain)
        assert (plain / "transformer" / "0.safetensors").exists()
        said = fail(*quantizes, "--recipe", "rtn-w8a16", "--out", tmp_path / "no", "--blocks", 1)
        assert "--blocks mean nothing for" in said
    said = fail(*quantizes, "--recipe", "rtn-w8a16", "--out", tmp_path / "no", "--lora-scales", 1)
    assert "--lora-scales: 1 scales for 0 files of --lora-paths" in said


def test_options_of_pipelines_are_for_them_alone(tmp_path):
    said = fail(
        "quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w8a16", "--vae-recipe", "keep", "--out", tmp_path / "no"
    )
    assert "--vae-recipe are for pipelines of mflux, and mmdit-shapes is none" in said


def test_tcaqdm_opens_attention_and_draws_again(tmp_path):
    folder = dense("schnell")
    recipe = parse_recipe("tcaqdm-w4a8")
    recipe = replace(recipe, learning=replace(recipe.learning, iterations=3))
    labels = []

    def watch(items, label):
        labels.append(label)
        return items

    with small_models():
        pipeline = MfluxPipeline.load(str(folder))
        report = quantize_pipeline(
            pipeline, CALIBRATION, recipe, None, steps=2, size=SIZE, work=tmp_path / "work", progress=watch
        )
        picture = drawn(pipeline)
        save_pipeline(pipeline, report, tmp_path / "ours")
        again = load_pipeline(tmp_path / "ours")
    assert labels.count("drawing") == 2  # to calibrate, and for the second round
    assert len(find_quantized_attentions(pipeline.pipeline.transformer)) == 4
    assert {path.name for path in (tmp_path / "work" / "transformer").iterdir()} >= {"round-1", "round-2"}
    np.testing.assert_array_equal(drawn(again), picture)
