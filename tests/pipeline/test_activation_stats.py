"""Step 2 of the activation track: statistics that a plain NumPy reference agrees with, resumable, refused when stale or
incomplete.
"""

import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import measure
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, NumericsError
from mlxquant.layers.tree import Tap, tapped
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.models.stages import Stage
from mlxquant.pipeline import activation_stats, replay, samples
from mlxquant.pipeline import ledger as ledgers
from mlxquant.pipeline.activation_stats import ActivationStats
from mlxquant.pipeline.collecting import MovingCentre, Picks
from mlxquant.pipeline.replay import HIST_EDGES
from mlxquant.pipeline.samples import Samples

from support.six_steps import draw_in_process, files
from support.tiny_pictures import TINY, tiny_adapter

IMAGES, STEPS, STRIDE, ROWS = 3, 4, 2, 8
IMAGE = "multimodal_transformer_blocks.0.image_transformer_block"
TEXT = "multimodal_transformer_blocks.0.text_transformer_block"


@pytest.fixture(autouse=True)
def small_and_plain(monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "batch", 2)  # three images are two batches
    monkeypatch.setattr(replay, "draw_ranges", lambda curves, path: path.write_text(" ".join(curves)))


make_samples = partial(draw_in_process, images=IMAGES, steps=STEPS)


@pytest.fixture
def calib(tmp_path):
    make_samples(tmp_path / "c")
    return tmp_path / "c"


def collect(calib, out=None, adapter=None, images=IMAGES, stride=STRIDE, rows=ROWS, seed=0, **options):
    out = out or calib / "activations"
    return replay.collect(adapter or tiny_adapter(), Samples.read(calib), images, stride, rows, seed, out, **options)


def expected_layers():
    linears = tiny_adapter().layers()
    return [path for path in linears if "_blocks." in path and (".attn." in path or ".mlp." in path)]


def inputs(calib, cfg):
    """Sigma and {layer: one [tokens,in] float64 array a sample} at each kept step, one picture and one side at
    a time.
    """
    adapter, drawn = tiny_adapter(), Samples.read(calib)
    for step in range(0, STEPS, STRIDE):
        sigma, seen = float(drawn.sigmas[step]), {}

        def observe(path, x, seen=seen):
            seen.setdefault(path, []).append(np.array(x, np.float64).reshape(-1, x.shape[-1]))

        for image, prompt in enumerate(drawn.prompts):
            latent = mx.array(np.load(calib / f"samples/{image:04d}_{step:03d}.npz")["x"])[None]
            for text in {1.0: [prompt.text], 0.0: [""]}.get(cfg, [prompt.text, ""]):
                side = adapter.encode([text])
                with tapped(adapter.module, adapter.layers(), observe):
                    adapter.velocity(latent, side, sigma)
        yield sigma, seen


def averaged(low, rows):
    """[in]: the mean, by how many each has, over batches of so many rows, of each batch's smallest."""
    batches = [low[start : start + rows] for start in range(0, len(low), rows)]
    return np.average([batch.min(0) for batch in batches], axis=0, weights=[len(batch) for batch in batches])


@pytest.mark.parametrize(("cfg", "batch"), [(2.0, 2), (2.0, 1), (2.0, 32), (1.0, 2), (0.0, 3)])
def test_every_layer_agrees_with_numpy(tmp_path, cfg, batch):
    make_samples(tmp_path / "c", cfg=cfg)
    collect(tmp_path / "c", range_batch=batch)
    stats = ActivationStats.read(tmp_path / "c" / "activations" / "layer_statistics.json")
    assert stats.range_batch == min(batch, IMAGES)
    reference = list(inputs(tmp_path / "c", cfg))[::-1]  # sigma ascending
    assert stats.layers == expected_layers()
    assert stats.step_keys == ["2", "0"]
    np.testing.assert_allclose(stats.sigmas, [sigma for sigma, _ in reference], rtol=1e-6)
    assert stats.sigmas.dtype == np.float32
    close = {"rtol": 1e-4, "atol": 1e-5}
    for path in stats.layers:
        ranges, shift, (edges, counts), summary = (
            stats.ranges(path),
            stats.shift(path),
            stats.histogram(path),
            stats.summary(path),
        )
        assert (shift is not None) == path.endswith("fc2")
        np.testing.assert_array_equal(ranges.sigma, stats.sigmas)
        assert ranges.rows.dtype == np.float32
        for t, (_, seen) in enumerate(reference):
            some = seen[path]
            low, high = np.stack([x.min(0) for x in some]), np.stack([x.max(0) for x in some])
            avg_low, avg_high = (
                averaged(low, len(some) // IMAGES * batch),
                -averaged(-high, len(some) // IMAGES * batch),
            )
            np.testing.assert_allclose(ranges.low[t], avg_low, **close)
            np.testing.assert_allclose(ranges.high[t], avg_high, **close)
            np.testing.assert_allclose(ranges.least[t], low.min(0), **close)
            np.testing.assert_allclose(ranges.most[t], high.max(0), **close)
            if shift is not None:
                weights = 0.95 ** np.arange(len(some))[::-1]
                np.testing.assert_allclose(shift[t], np.average((low + high) / 2, axis=0, weights=weights), **close)
            for r, row in enumerate(ranges.rows[t]):
                x = some[r * len(some) // ROWS]
                assert np.abs(x - row).max(1).min() < 1e-3 * max(1, np.abs(x).max())
            np.testing.assert_allclose(
                counts[t], np.histogram(np.abs(ranges.rows[t]), edges)[0], atol=0.01 * counts[t].sum()
            )
            assert counts[t].sum() == ROWS * low.shape[1]
            magnitudes, peaks = np.abs(ranges.rows[t]), np.maximum(-low.min(0), high.max(0))
            wanted = {
                "tensor_absmax": peaks.max(),
                "tensor_min": low.min(),
                "tensor_max": high.max(),
                "tensor_avg_min": avg_low.min(),
                "tensor_avg_max": avg_high.max(),
                "channel_p99": np.percentile(peaks, 99),
                "channel_p100": peaks.max(),
            }
            for name, value in wanted.items():
                np.testing.assert_allclose(summary[t][name], value, **close)
            for name, percent in {"hist_p50": 50, "hist_p99": 99, "hist_p999": 99.9}.items():
                np.testing.assert_allclose(summary[t][name], np.percentile(magnitudes, percent), rtol=2e-3)


def test_layers_that_read_the_same_tensor_share_one_entry(calib):
    stats = collect(calib)
    for stream in (IMAGE, TEXT):
        assert [stats.leader(f"{stream}.attn.{name}_proj") for name in "qkv"] == [f"{stream}.attn.q_proj"] * 3
        assert [stats.after(f"{stream}.{name}") for name in ("attn.q_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")] == [
            "",
            "",
            "",
            "gelu",
        ]
        for name in ("attn.o_proj", "mlp.fc1", "mlp.fc2"):
            assert stats.leader(f"{stream}.{name}") == f"{stream}.{name}"
    with np.load(calib / "activations" / "timestep_stats" / "step_0.npz") as arrays:
        names = {name.partition("__")[0] for name in arrays.files if not name.endswith("__sensitivity")}
        assert names == {*stats.leaders, "hist_edges"}
        assert arrays[f"{IMAGE}.mlp.fc2__rows"].dtype == np.float16
        np.testing.assert_array_equal(arrays["hist_edges"], HIST_EDGES)
    assert len(stats.leaders) == len(stats.layers) - 4 * 2


@pytest.mark.parametrize(("images", "cfg", "rows"), [(3, 2.0, (4, 2)), (3, 1.0, (2, 1))])
def test_every_layer_has_the_sensitivity_of_its_own_outputs(tmp_path, images, cfg, rows):
    """Of the first eight rows at most, as many at once as the model's batch has pictures."""
    make_samples(tmp_path / "c", cfg=cfg)
    stats, adapter, drawn = collect(tmp_path / "c", seed=7), tiny_adapter(), Samples.read(tmp_path / "c")
    linears = adapter.layers()
    for t, step in enumerate(stats.step_keys):
        index = int(step) // STRIDE
        calibration = drawn.calibration(images, STRIDE)
        one = replace(
            calibration, sigmas=calibration.sigmas[index : index + 1], latents=calibration.latents[index : index + 1]
        )
        sigmas, states = one.batches(adapter, 2)
        assert tuple(len(state["t"]) for state in states) == rows
        expected = measure(Passes(adapter, sigmas), adapter.stages, states, stats.layers, 7 + index)
        means = json.loads((tmp_path / "c" / "activations" / "timestep_stats" / f"step_{step}_index.json").read_text())[
            "sensitivity"
        ]
        assert set(means) == set(stats.layers)
        for path in stats.layers:
            found = stats.sensitivity(path)
            assert found.shape == (2, linears[path].weight.shape[0])
            assert found.dtype == np.float32
            np.testing.assert_allclose(found[t], expected.layers[path][0], rtol=1e-6)
            assert means[path] == pytest.approx(float(found[t].mean()))
    unused = "multimodal_transformer_blocks.1.text_transformer_block.attn.q_proj"  # the last block drops what text asks
    assert {path for path in stats.layers if not stats.sensitivity(path).any()} == {unused}


def test_sensitivities_are_of_the_first_rows_alone(calib, monkeypatch):
    seen = []
    monkeypatch.setattr(replay, "SENSITIVITY_ROWS", 2)
    monkeypatch.setattr(replay, "measure", lambda *a: (seen.append([len(s["t"]) for s in a[2]]), measure(*a))[1])
    collect(calib)
    assert seen == [[2], [2]]


@pytest.mark.parametrize("range_batch", [1, 2, 32])
def test_how_many_images_the_model_takes_at_once_does_not_matter(calib, monkeypatch, range_batch):
    two = collect(calib, range_batch=range_batch)
    monkeypatch.setattr(MMDiTShapes, "batch", 16)
    one = collect(calib, calib / "b", range_batch=range_batch)
    for path in one.leaders:
        for field in ("low", "high", "least", "most", "rows"):
            np.testing.assert_allclose(
                getattr(one.ranges(path), field), getattr(two.ranges(path), field), rtol=2e-3, atol=2e-3
            )
    path = f"{IMAGE}.mlp.fc2"
    np.testing.assert_allclose(one.shift(path), two.shift(path), rtol=1e-4, atol=1e-5)


def test_statistics_of_another_range_batch_are_other_statistics(calib):
    """Above the number of images there is no other."""
    path = f"{IMAGE}.mlp.fc2"
    kept = collect(calib, range_batch=IMAGES)
    whole = kept.ranges(path)
    np.testing.assert_array_equal(whole.high, whole.most)
    np.testing.assert_array_equal(whole.low, whole.least)
    assert collect(calib, range_batch=99).sha256 == kept.sha256
    with pytest.raises(ArtifactError, match="range_batch"):
        collect(calib, range_batch=2)
    found = collect(calib, range_batch=2, force=True)
    assert found.range_batch == 2
    assert (found.ranges(path).high <= whole.high).all()
    assert (found.ranges(path).high < whole.high).any()
    np.testing.assert_array_equal(found.ranges(path).most, whole.most)


def test_older_folders_do_not_say_and_averaged_single_samples(calib):
    stats = collect(calib)
    del stats.ledger.facts["range_batch"]
    stats.ledger.save(complete=True)
    assert ActivationStats.read(calib / "activations" / "layer_statistics.json").range_batch == 1


def test_rows_follow_the_seed(calib):
    kept = [
        collect(calib, calib / str(i), seed=seed).ranges(f"{IMAGE}.mlp.fc1").rows for i, seed in enumerate((0, 0, 1))
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])


@pytest.mark.parametrize(("rows", "samples", "tokens"), [(32, 10, 64), (8, 20, 64), (7, 3, 5), (1, 1, 1)])
def test_rows_are_spread_over_samples_and_tokens(rows, samples, tokens):
    picks = Picks.draw(rows, samples, (0, 4))
    found = []
    for first in range(0, samples, 2):
        sample, token = picks.among(first, min(2, samples - first), tokens)
        found += [(first + s, t) for s, t in zip(sample.tolist(), token.tolist(), strict=True)]
    assert len(found) == rows
    counts = np.bincount([s for s, _ in found], minlength=samples)
    assert counts.max() - counts.min() <= 1
    assert len({t for _, t in found}) >= min(rows, tokens) / 2
    assert all(0 <= t < tokens for _, t in found)


def test_few_samples_do_not_leave_the_centre_at_the_first():
    """A momentum of 0.95 that starts at the first of five samples still has 81 % of it at the end."""
    centre = MovingCentre(1, 0.95)
    for value in (10.0, 0.0, 0.0, 0.0, 0.0):
        centre.add(np.array([[value - 1]]), np.array([[value + 1]]))
    assert 1.5 < centre.value[0] < 2.0
    once = MovingCentre(1, 0.95)
    once.add(np.array([[3.0]]), np.array([[5.0]]))
    np.testing.assert_allclose(once.value, [4.0])


def test_many_samples_leave_a_moving_average():
    centre = MovingCentre(1, 0.95)
    values = np.random.default_rng(0).standard_normal((400, 1))
    centre.add(values, values)
    running = values[0]
    for value in values[1:]:
        running = 0.95 * running + 0.05 * value
    np.testing.assert_allclose(centre.value, running, atol=1e-6)


def test_rows_beyond_float16_are_kept_whole():
    rows = np.array([[1e5, -3.0]], np.float32)
    np.testing.assert_array_equal(replay._half(rows), rows)


def taps(adapter):
    return [path for path, module in adapter.module.named_modules() if isinstance(module, Tap)]


def test_nan_is_refused_with_layer_and_timestep(calib, monkeypatch):
    adapter, calibration = tiny_adapter(), Samples.calibration

    def poisoned(self, images, stride):
        whole = calibration(self, images, stride)
        latents = np.array(whole.latents)
        latents[1, 2, 0, 0, 0] = np.nan
        return replace(whole, latents=mx.array(latents))

    message = (
        r"step 2 \(sigma 0.3\d+\): the input of layer"
        r" multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj holds NaN"
    )
    with monkeypatch.context() as patch, pytest.raises(NumericsError, match=message):
        patch.setattr(Samples, "calibration", poisoned)
        collect(calib, adapter=adapter)
    assert taps(adapter) == []
    assert sorted(p.name for p in (calib / "activations" / "timestep_stats").iterdir()) == [
        "step_0.npz",
        "step_0_index.json",
    ]
    with pytest.raises(ArtifactError, match="not finished"):
        ActivationStats.read(calib / "activations" / "layer_statistics.json")
    assert len(collect(calib).sigmas) == 2


def test_the_model_is_as_before(calib):
    adapter = tiny_adapter()
    before, linears = adapter.fingerprint, adapter.layers()
    collect(calib, adapter=adapter)
    assert taps(adapter) == []
    assert adapter.fingerprint == before
    assert all(layer is linears[path] for path, layer in adapter.layers().items())


@pytest.mark.parametrize("written", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(calib, tmp_path, monkeypatch, written):
    collect(calib, tmp_path / "whole", range_batch=2)
    write, done = ledgers.write_npz, []

    def writing(path, arrays):
        done.append(path.name)
        return write(path, arrays)

    def killed_writing(path, arrays):
        return interrupted() if len(done) == written else writing(path, arrays)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ledgers, "write_npz", killed_writing)
        patch.setattr(replay, "draw_ranges", interrupted)
        collect(calib, tmp_path / "killed", range_batch=2)
    assert not (tmp_path / "killed" / "ranges.png").exists()
    monkeypatch.setattr(ledgers, "write_npz", writing)
    collect(calib, tmp_path / "killed", range_batch=2)
    assert done == ["step_0.npz", "step_2.npz"]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_finished_statistics_are_not_collected_again(calib, monkeypatch):
    collect(calib)
    before = files(calib / "activations")
    monkeypatch.setattr(replay, "_run", None)
    collect(calib)
    assert files(calib / "activations") == before


@pytest.mark.parametrize("change", [{"images": 2}, {"stride": 1}, {"rows": 4}, {"seed": 1}])
def test_other_settings_need_force(calib, change):
    collect(calib)
    with pytest.raises(ArtifactError, match="--force"):
        collect(calib, **change)
    stats = collect(calib, **change, force=True)
    assert len(stats.sigmas) == (4 if "stride" in change else 2)
    assert stats.ranges(f"{IMAGE}.mlp.fc1").rows.shape[1] == change.get("rows", ROWS)


def test_statistics_of_other_trajectories_are_stale(calib):
    old = collect(calib)
    adapter, drawn = tiny_adapter(), Samples.read(calib)
    samples.draw(adapter, samples.open_folder(adapter, drawn.prompts, STEPS, 1.0, 0, calib, force=True))
    with pytest.raises(ArtifactError, match=r"other settings or inputs \(manifest.json\)"):
        collect(calib)
    assert collect(calib, force=True).calibration != old.calibration
    assert (
        ActivationStats.read(calib / "activations" / "layer_statistics.json").calibration == Samples.read(calib).sha256
    )


def test_what_does_not_fit_is_refused_before_anything_is_written(calib):
    other = MMDiTShapes.blank({"config": TINY})
    other.module.update(tree_map(lambda x: mx.full(x.shape, 0.01), other.module.parameters()))
    with pytest.raises(CalibrationError, match="other weights"):
        collect(calib, adapter=other)
    with pytest.raises(CalibrationError, match="4 images wanted, it has 3"):
        collect(calib, images=4)
    with pytest.raises(CalibrationError, match="stride of 5"):
        collect(calib, stride=5)
    assert not (calib / "activations").exists()


def test_no_layer_is_skipped_silently(calib, monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "role", lambda self, path: "embedder")
    with pytest.raises(AdapterError, match="lists no attention or MLP layers in its 2 blocks"):
        collect(calib)
    assert not (calib / "activations").exists()


def test_a_layer_that_is_never_reached_is_an_error(calib):
    adapter = tiny_adapter()
    first, block, *rest = adapter.stages
    adapter._stages = (first, Stage(block.name, block.prefixes, lambda state: state), *rest)
    with pytest.raises(
        AdapterError, match=r"12 of 21 layers were never reached, the first is multimodal_transformer_blocks\.0\."
    ):
        collect(calib, adapter=adapter)
    assert taps(adapter) == []
    assert files(calib / "activations") == {}


@pytest.mark.parametrize("name", ["step_2.npz", "step_2_index.json"])
def test_damaged_files_are_refused(calib, name):
    collect(calib)
    path = calib / "activations" / "timestep_stats" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    stats = ActivationStats.read(calib / "activations" / "layer_statistics.json")
    with pytest.raises(ArtifactError, match=f"{name}: sha256 .* was changed or damaged"):
        stats.ranges(f"{IMAGE}.mlp.fc1") if name.endswith("npz") else stats.summary(f"{IMAGE}.mlp.fc1")


def test_lost_files_are_made_again(calib):
    collect(calib)
    before = files(calib / "activations")
    (calib / "activations" / "timestep_stats" / "step_0.npz").unlink()
    collect(calib)
    assert files(calib / "activations") == before


def test_reading_is_lazy_and_verifies_once(calib, monkeypatch):
    collect(calib)
    digests, digest = [], activation_stats.file_digest
    monkeypatch.setattr(activation_stats, "file_digest", lambda path: (digests.append(path.name), digest(path))[1])
    stats = ActivationStats.read(calib / "activations" / "layer_statistics.json")
    assert digests == []
    for path in stats.layers:
        stats.ranges(path)
        stats.summary(path)
        stats.sensitivity(path)
    assert sorted(digests) == ["step_0.npz", "step_0_index.json", "step_2.npz", "step_2_index.json"]


def test_unknown_layers_and_missing_statistics_are_one_clear_error(calib):
    with pytest.raises(ArtifactError, match="run 'mlxquant collect-layer-activations' first"):
        ActivationStats.read(calib / "activations" / "layer_statistics.json")
    stats = collect(calib)
    for ask in (stats.ranges, stats.sensitivity):
        with pytest.raises(ArtifactError, match=r"has no layer 'final_layer\.linear'; it has 21"):
            ask("final_layer.linear")


def test_artifacts_hold_no_absolute_paths(calib):
    collect(calib)
    for name, data in files(calib / "activations").items():
        assert str(calib).encode() not in data, name
