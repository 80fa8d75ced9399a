"""Both tracks in one model: what was divided is divided on both sides, tables are those of the divided input, strangers
are refused.
"""

import mlxquant as mq  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError, CalibrationError, RecipeError
from mlxquant.files.checked import file_digest
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.tree import tapped
from mlxquant.methods.inputs.clipping import affine_table
from mlxquant.pipeline.apply import TrackFiles, Tracks, check, install, prepare
from mlxquant.pipeline.divisions import Division
from mlxquant.pipeline.ledger import Ledger
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.pipeline.weight_files import CONFIG, KIND, WeightFiles
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.collecting import Collector
from mlxquant.sweep.rounding import round_to_nearest
from mlxquant.sweep.store import StageResult

from support.tiny_pictures import tiny_adapter

BLOCK = "multimodal_transformer_blocks.0"
Q, OUT, FC1, FC2 = (
    f"{BLOCK}.image_transformer_block.{name}" for name in ("attn.q_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")
)
CALIBRATION = "c" * 64


def divisor(path, width):
    """A division that no 8-bit grid survives when only one side of it is done."""
    rng = np.random.default_rng(len(path))
    return (2 ** rng.integers(0, 4, width) if path == FC2 else np.exp(rng.uniform(-2, 2, width))).astype(np.float32)


def ranges(adapter):
    """Extremes of every block layer's input on real trajectories, by path: sigma [T], least and most [T,in]."""
    calibration = mq.calibrate(mq.Model(adapter), prompts=2, steps=3)
    layers = [path for edge in adapter.edges() for path in edge.consumers]
    collector = Collector(adapter.layers())
    with tapped(adapter.module, layers, collector):
        for sigma, state in zip(*calibration.batches(adapter), strict=True):
            collector.sigma = sigma
            adapter.run(state, sigma)
    return {path: collector[path].ranges for path in layers}


def table(found, by=1.0, bits=8):
    return affine_table(found.sigma, (found.least / by).min(1), (found.most / by).max(1), bits)


@pytest.fixture(scope="module")
def config():
    """A config that divides four inputs of the first block; tables of three widths on plain inputs, of 8 bits on
    divided ones.
    """
    adapter = tiny_adapter()
    seen = ranges(adapter)
    plain = {path: table(found, bits=(8, 6, 4)[index % 3]) for index, (path, found) in enumerate(seen.items())}
    edges = {edge.consumers[0]: edge for edge in adapter.edges()}
    divisions = {}
    for path in (Q, OUT, FC1, FC2):
        by = divisor(path, seen[path].least.shape[1])
        layers = edges[path].consumers
        divisions[path] = Division(layers, by, True, {}, {layer: table(seen[layer], by) for layer in layers})
    migration = {FC2: divisions.pop(FC2)}
    facts = {"model": adapter.name, "source": adapter.fingerprint, "calibration": CALIBRATION}
    keys = tuple(map(str, range(len(seen[Q].sigma))))
    return QuantConfig(facts, keys, seen[Q].sigma, plain, {}, divisions, migration)


def velocity(adapter):
    latent = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(1))
    text = adapter.encode(["a large red circle at left on white background", ""])
    return np.array(adapter.velocity(latent, text, 0.5))


def error(found, exact):
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def write_weights(folder, config, bits=8, **changes):
    """Weights rounded to nearest in ``bits`` bits, after the config's divisions where one is given."""
    adapter = tiny_adapter()
    source, presets = adapter.fingerprint, {} if config is None else prepare(adapter, config)
    blocks = adapter.blocks
    linears = adapter.block_linears()
    facts = {
        "model": adapter.name,
        "source": source,
        "calibration": CALIBRATION,
        "quant_config": None,
        "recipe": {},
        **changes,
    }
    files = WeightFiles(Ledger.open(folder / CONFIG, KIND, facts, "adaround-optimize"), blocks, linears)
    for block in blocks:
        layers = {}
        for path, linear in linears.items():
            if block.owns(path):
                by = presets[path].divisor if path in presets else None
                linear.weight = linear.weight if by is None else linear.weight * mx.array(by)
                plain = round_to_nearest(linear, LayerSpec(WeightFormat(bits)))
                bias = linear.bias if "bias" in linear else None
                layers[path] = QuantizedLinear(plain.codes(), plain.grid(), bias, None if by is None else mx.array(by))
        report = {path: {"activation": 8.0, "error": 0.5} for path in layers}
        files.save(block, StageResult(layers, {"stage": block.name, "kept": "rtn", "error": 0.0, "layers": report}))
    files.finish()
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, config):
    """Both tracks, the weights rounded after the config's divisions."""
    folder = tmp_path_factory.mktemp("tracks")
    config.write(folder / "quant_config.json")
    write_weights(folder / "weights", config, quant_config=file_digest(folder / "quant_config.json"))
    return TrackFiles(folder / "weights", folder / "quant_config.json")


@pytest.fixture(scope="module")
def undivided(tmp_path_factory, files):
    """The same config with weights that were rounded without it."""
    return TrackFiles(write_weights(tmp_path_factory.mktemp("plain"), None), files.config)


def assembled(files, active):
    adapter = tiny_adapter()
    install(adapter, files.store(adapter, active=active), adapter.blocks)
    return adapter


def test_preparing_changes_the_weights_and_not_the_model(config):
    adapter, exact = tiny_adapter(), velocity(tiny_adapter())
    presets = prepare(adapter, config)
    assert adapter.fingerprint != tiny_adapter().fingerprint
    assert error(velocity(adapter), exact) < 1e-5
    assert set(presets) == set(config.plain)
    assert {path for path, preset in presets.items() if preset.divisor is not None} == {FC2}
    for path in (Q, Q.replace("q_proj", "v_proj"), OUT, FC1, FC2):
        assert presets[path].table is config.tables(smoothed=True, migrated=True)[path]
        assert (presets[path].table.bits == 8).all()


def test_weights_rounded_after_a_division_are_used_after_it(files, config):
    """The velocity stays within the error of 8 bits, and is far out when only one side is divided."""
    exact = velocity(tiny_adapter())
    assert error(velocity(assembled(files, active=False)), exact) < 0.02
    adapter = tiny_adapter()  # the division left out
    weights = WeightFiles.read(files.weights, adapter.blocks, adapter.layers())
    install(adapter, Tracks(weights, None, divided=True), adapter.blocks)
    assert error(velocity(adapter), exact) > 0.3


def test_tables_are_of_the_input_that_the_weights_were_rounded_for(files, undivided, config):
    exact = velocity(tiny_adapter())
    adapter = assembled(files, active=True)
    assert error(velocity(adapter), exact) < error(velocity(assembled(undivided, active=True)), exact)
    for one, divided in ((files, True), (undivided, False)):
        adapter = assembled(one, active=True)
        expected = config.tables(smoothed=divided, migrated=divided)
        for path, layer in adapter.module.named_modules():
            if isinstance(layer, QuantizedLinear):
                assert (layer.table is None) == (path not in expected)
                if layer.table is not None:
                    np.testing.assert_array_equal(layer.table.step, expected[path].step)
                    np.testing.assert_array_equal(layer.table.bits, expected[path].bits)


def test_only_v2_quantizes_activations(files):
    for active in (False, True):
        layers = {
            path: m for path, m in assembled(files, active).module.named_modules() if isinstance(m, QuantizedLinear)
        }
        assert len(layers) > 20
        assert {path for path, layer in layers.items() if layer.table is not None} == (
            {path for path in layers if "adaLN" not in path} if active else set()
        )


def test_layers_outside_the_blocks_stay_as_they_are(files):
    adapter, plain = assembled(files, active=True), tiny_adapter()
    for path, layer in plain.layers().items():
        if "blocks" not in path:
            np.testing.assert_array_equal(np.array(adapter.layers()[path].weight), np.array(layer.weight))
    store = files.store(tiny_adapter())
    assert store.load(plain.stages[0], plain.clock) is None
    assert store.checkpoint(plain.stages[1]) is None


def test_weights_of_other_weights_are_refused(files):
    adapter = tiny_adapter()
    adapter.module.final_layer.linear.weight = adapter.module.final_layer.linear.weight + 1
    with pytest.raises(
        CalibrationError, match=r"config\.json: the learned weights are of mmdit-shapes with other weights"
    ):
        files.store(adapter)


def test_weights_need_the_very_config_that_they_were_rounded_with(files, config, tmp_path):
    with pytest.raises(
        ArtifactError, match=r"rounded with a quantization config of sha256 .*none was given; pass that one"
    ):
        TrackFiles(files.weights).store(tiny_adapter())
    replace(config, layers={"changed": {"shifted": False, "relative_error": 0.0}}).write(tmp_path / "quant_config.json")
    with pytest.raises(ArtifactError, match=r"sha256 .*, found .*; pass that one with --quant-config"):
        TrackFiles(files.weights, tmp_path / "quant_config.json").store(tiny_adapter())


def test_a_config_of_other_weights_or_data_is_refused(files, undivided, config, tmp_path):
    adapter, path = tiny_adapter(), tmp_path / "quant_config.json"
    for change, message in (
        (
            {"calibration": "d" * 64},
            r"different calibration data \(cccccccccccc… and dddddddddddd…\); run both tracks on one --calib-dir",
        ),
        ({"source": "feed" * 16}, r"with weights feedfeedfeed…; collect and analyze the activations of this model"),
        ({"model": "sd9"}, "the quantization config of sd9"),
    ):
        changed = replace(config, facts=config.facts | change)
        with pytest.raises(CalibrationError, match=message):
            check(changed, adapter.name, adapter.fingerprint, CALIBRATION, tmp_path)
        changed.write(path)
        with pytest.raises(CalibrationError, match=message):
            TrackFiles(undivided.weights, path).store(tiny_adapter())


def test_a_refused_config_leaves_the_model_as_it_was(undivided, config, tmp_path):
    replace(config, facts=config.facts | {"calibration": "d" * 64}).write(tmp_path / "quant_config.json")
    adapter = tiny_adapter()
    with pytest.raises(CalibrationError):
        TrackFiles(undivided.weights, tmp_path / "quant_config.json").store(adapter)
    assert adapter.fingerprint == tiny_adapter().fingerprint


def test_formats_must_be_those_of_the_recipe(undivided):
    adapter = tiny_adapter()
    roles = {path: adapter.role(path) for path in adapter.layers()}
    undivided.store(adapter, parse_recipe("taqdit-w8a8").plan(roles))
    with pytest.raises(RecipeError, match="is in format w8, the recipe wants w4; choose its recipe"):
        undivided.store(adapter, parse_recipe("taqdit-w4a8").plan(roles))
    kept = parse_recipe("taqdit-w8a8", ["*.0.*.mlp.fc2=keep"]).plan(roles)
    with pytest.raises(
        RecipeError, match=r"\.0\..*fc2 is in format w8, the recipe wants it kept as it is; choose its recipe"
    ):
        undivided.store(adapter, kept)


def test_the_report_is_of_the_activations_that_run(undivided, config):
    """Not of those that the weights were learned with: 8 bits everywhere."""
    adapter = tiny_adapter()
    block = adapter.stages[1]
    for active in (False, True):
        tracks = undivided.store(adapter, active=active)
        report = tracks.load(block, adapter.clock).facts["layers"]
        for path in (Q, FC1):
            assert report[path]["activation"] == (config.plain[path].bits.mean() if active else 16)
        assert report[Q]["error"] == 0.5


def test_both_files_are_named_by_their_digests(files):
    assert files.digests == {
        "config.json": file_digest(files.weights / "config.json"),
        "quant_config.json": file_digest(files.config),
    }
    assert set(TrackFiles(files.weights).digests) == {"config.json"}
