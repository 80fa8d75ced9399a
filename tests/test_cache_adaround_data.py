"""Step 2 of the weight track: what is cached is what the blocks compute, small, resumable, and refused when stale."""

import shutil
from collections import namedtuple
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxquant.commandline import cli
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, NumericsError
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.models.stages import Stage
from mlxquant.pipeline import block_cache, caching, samples
from mlxquant.pipeline.block_cache import BlockCache, draw_tokens
from mlxquant.pipeline.samples import Samples

from support import command_line
from support.six_steps import draw_in_process, files, interrupt_writing, use_tiny_model
from support.tiny_pictures import TINY, tiny_adapter

IMAGES, STEPS, STRIDE = 3, 4, 2
SMALL = ["--num-images", IMAGES, "--stride", STRIDE]
Usage = namedtuple("Usage", "total used free")
VERB = ("cache-adaround-data", *SMALL, "--calib-dir")
run, succeed, fail = command_line.of(*VERB)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    use_tiny_model(monkeypatch, batch=2)  # three images are two batches


make_samples = partial(draw_in_process, images=IMAGES, steps=STEPS)


@pytest.fixture
def calib(tmp_path):
    make_samples(tmp_path / "c")
    return tmp_path / "c"


def direct(adapter, folder, cfg=2.0):
    """Without hooks or files: at each noise level, every stage's output state, rows guided then unguided of each image
    in turn.
    """
    prompts = Samples.read(folder).prompts
    text, empty = adapter.encode([p.text for p in prompts]), adapter.encode([""])
    for step in range(0, STEPS, STRIDE):
        sigma, parts = float(adapter.sigmas(STEPS)[step]), []
        for image in range(IMAGES):
            x = mx.array(np.load(folder / f"samples/{image:04d}_{step:03d}.npz")["x"])[None]
            sides = {0: [empty], 1: [text.take(slice(image, image + 1))]}.get(
                cfg, [text.take(slice(image, image + 1)), empty]
            )
            states = [adapter.state(x, side, sigma) for side in sides]
            state, chain = {key: mx.concatenate([s[key] for s in states]) for key in states[0]}, []
            for stage in adapter.stages:
                state = stage.run(state)
                chain.append(state)
            parts.append(chain)
        yield (
            sigma,
            [
                {key: np.concatenate([np.array(p[i][key]) for p in parts]) for key in parts[0][i]}
                for i in range(len(parts[0]))
            ],
        )


@pytest.mark.parametrize("cfg", [2.0, 1.0, 0.0])
def test_inputs_and_targets_are_what_the_blocks_compute(tmp_path, cfg):
    make_samples(tmp_path / "c", cfg=cfg)
    succeed(tmp_path / "c")
    cache, adapter = BlockCache.read(tmp_path / "c" / "adaround_cache"), tiny_adapter()
    assert cache.blocks == ("multimodal_transformer_blocks.0", "multimodal_transformer_blocks.1")
    sigmas, inputs = cache.inputs(adapter)
    targets = [cache.targets(block) for block in range(2)]
    expected = list(direct(adapter, tmp_path / "c", cfg))
    assert sigmas == [sigma for sigma, _ in expected] == sorted(sigmas, reverse=True)
    close = {"rtol": 2e-3, "atol": 2e-3}
    for index, (_, chain) in enumerate(expected):
        state = inputs[index]
        chosen = {key: np.array(state.pop(f"tokens/{key}")) for key in ("image", "text")}
        assert set(state) == {"latent", "image", "text", "c"}
        for key, value in state.items():
            assert value.dtype == mx.float32
            assert value.shape[0] == IMAGES * (2 if cfg == 2 else 1)
            np.testing.assert_allclose(np.array(value), chain[0][key], **close)
        assert [set(t[index]) for t in targets] == [{"image", "text"}, {"image"}]  # the last block only reads the text
        for block in range(2):
            for key, value in targets[block][index].items():
                whole = chain[1 + block][key]
                expected_rows = [whole[row, tokens] for row, tokens in enumerate(chosen[key])]
                np.testing.assert_allclose(np.array(value), expected_rows, **close)


def test_blocks_run_from_the_cached_inputs_reach_the_cached_targets(calib):
    """What a reconstruction does with the cache."""
    succeed(calib)
    cache, adapter = BlockCache.read(calib / "adaround_cache"), tiny_adapter()
    cache.check(adapter)
    for index, (sigma, state) in enumerate(zip(*cache.inputs(adapter), strict=True)):
        for block, stage in enumerate(adapter.blocks):
            with adapter.clock.at(sigma):
                state = stage.run(state)
            for key, target in cache.targets(block)[index].items():
                picked = block_cache.pick(state[key], state[f"tokens/{key}"])
                error = mx.square(picked - target).sum() / mx.square(target).sum()
                assert float(error.item()) < 1e-5


def test_the_folder_is_small_and_holds_no_conditioning(calib):
    """No inputs, outputs at a few tokens, float16, nothing that a prompt determines, no absolute paths."""
    facts, _ = succeed(calib)
    folder = calib / "adaround_cache"
    written = files(folder)
    assert set(written) == {"metadata.json", *(f"samples/000{i}_00{s}.npz" for i in range(IMAGES) for s in (0, 2))}
    assert facts["disk_bytes"] == sum(map(len, written.values()))
    assert str(calib.parent) not in written["metadata.json"].decode()
    rows, image, text, hidden = 2, 64, 12, 32
    with np.load(folder / "samples" / "0002_002.npz") as sample:
        shapes = {name: sample[name].shape for name in sample}
        assert {sample[name].dtype for name in sample} == {np.dtype(np.float16)}
    assert shapes == {"mm0__image": (rows, 8, hidden), "mm0__text": (rows, 4, hidden), "mm1__image": (rows, 8, hidden)}
    streams = 3 * (image + text) + image  # in and out of two blocks; the last one writes no text
    assert facts["seed_layout_bytes"] == IMAGES * 2 * rows * (2 * streams * hidden + 4 * (text * hidden + hidden))


def test_the_disk_it_announces_is_enough_and_not_far_off(calib):
    adapter = tiny_adapter()
    for tokens in (None, 0):
        plan = caching.plan(adapter, Samples.read(calib), IMAGES, STRIDE, tokens)
        cache = caching.write(plan, adapter, calib.parent / f"cache{tokens}")
        assert 0.3 * plan.disk_bytes < cache.ledger.disk_bytes <= plan.disk_bytes


def test_one_forward_pass_serves_all_blocks(calib, monkeypatch):
    """Passes are images times steps in batches, not multiplied by the blocks; one evaluation collects all arrays."""
    calls, evaluations = [], []
    run, evaluate = MMDiTShapes.run, mx.eval
    monkeypatch.setattr(MMDiTShapes, "run", lambda self, x, sigma: calls.append(len(x["t"])) or run(self, x, sigma))
    monkeypatch.setattr(caching.mx, "eval", lambda *some: evaluations.append(some) or evaluate(*some))
    succeed(calib)
    assert calls == [2, 4, 4, 2, 2]  # one to measure, then two steps of two images and two of one, guided and unguided
    assert sum(isinstance(some[0], dict) and "mm0__image" in some[0] for some in evaluations) == 4


@pytest.mark.parametrize(
    ("tokens", "image", "text"), [(None, 8, 4), (5, 5, 5), (20, 20, 12), (0, 64, 12), (1000, 64, 12)]
)
def test_tokens_are_sorted_distinct_and_the_same_for_both_sides(calib, tokens, image, text):
    succeed(calib, *([] if tokens is None else ["--tokens", tokens]), "--seed", 3)
    cache = BlockCache.read(calib / "adaround_cache")
    assert cache.tokens == {"image": (image, 64), "text": (text, 12)}
    state = cache.inputs(tiny_adapter())[1][0]
    for stream, (kept, length) in cache.tokens.items():
        drawn = np.array(state[f"tokens/{stream}"]).reshape(IMAGES, 2, kept)
        np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
        for row in drawn[:, 0].tolist():
            assert row == sorted(set(row))
            assert set(row) <= set(range(length))
    assert cache.targets(0)[1]["image"].shape == (2 * IMAGES, image, 32)


def test_tokens_follow_seed_image_and_step():
    """Fixed places would teach the rounding those places only: measured, it cost 1 dB."""
    counts = {
        name: (block_cache.kept_tokens(length, None), length) for name, length in {"image": 1024, "text": 154}.items()
    }
    assert counts == {"image": (128, 1024), "text": (19, 154)}
    first = draw_tokens(counts, 0, image=3, step=5)
    np.testing.assert_array_equal(first["image"], draw_tokens(counts, 0, image=3, step=5)["image"])
    for other in (
        draw_tokens(counts, 1, image=3, step=5),
        draw_tokens(counts, 0, image=2, step=5),
        draw_tokens(counts, 0, image=3, step=6),
    ):
        assert (first["image"] != other["image"]).any()


@pytest.mark.parametrize("writes", [0, 1, 3, 5])
def test_an_interrupted_run_resumes_to_the_same_bytes(calib, monkeypatch, writes):
    whole = calib.parent / "whole"
    succeed(calib, "--output-dir", whole)
    with monkeypatch.context() as patch:
        interrupt_writing(patch, writes)
        assert run(calib).exit_code == 130
    folder = calib / "adaround_cache"
    assert not list(folder.rglob("*.tmp"))
    if writes >= 2:
        with pytest.raises(ArtifactError, match="not finished"):
            BlockCache.read(folder)
        assert len(BlockCache.read(folder, complete=False).ledger.files) == (2 if writes == 3 else 5)
    calls, run_chain = [], MMDiTShapes.run
    monkeypatch.setattr(MMDiTShapes, "run", lambda *given: calls.append(given) or run_chain(*given))
    succeed(calib)
    assert len(calls) == 1 + {0: 4, 1: 4, 3: 3, 5: 1}[writes]
    assert files(folder) == files(whole)


def test_a_sample_is_a_function_of_its_own_inputs(calib):
    """Other steps do not change it; only the images it is batched with are part of its definition."""
    succeed(calib)
    succeed(calib, "--stride", 1, "--output-dir", calib.parent / "every")
    few, many = files(calib / "adaround_cache"), files(calib.parent / "every")
    shared = sorted(name for name in few if name.startswith("samples"))
    assert len(shared) == 6
    for name in shared:
        assert few[name] == many[name]


def test_a_stale_cache_is_refused_and_force_makes_it_anew(calib):
    succeed(calib)
    before = files(calib / "adaround_cache")
    assert "other settings or inputs (sigmas, stride)" in fail(calib, "--stride", 3)
    adapter = tiny_adapter()
    ledger = samples.open_folder(adapter, adapter.prompts("calibration", IMAGES), STEPS, 3.0, 0, calib, force=True)
    samples.draw(adapter, ledger)
    assert "other settings or inputs (cfg, manifest.json)" in fail(calib)
    assert files(calib / "adaround_cache") == before
    succeed(calib, "--force")
    cache = BlockCache.read(calib / "adaround_cache")
    assert cache.calibration == Samples.read(calib).sha256
    assert files(calib / "adaround_cache")["samples/0000_002.npz"] != before["samples/0000_002.npz"]


def test_damaged_files_are_refused(calib):
    with pytest.raises(ArtifactError, match="cache-adaround-data"):
        BlockCache.read(calib / "adaround_cache")
    succeed(calib)
    path = calib / "adaround_cache" / "samples" / "0001_002.npz"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    cache = BlockCache.read(calib / "adaround_cache")
    with pytest.raises(ArtifactError, match=r"0001_002\.npz.*changed"):
        cache.targets(0)
    with pytest.raises(ArtifactError, match="no block 2; it has blocks 0 to 1"):
        cache.targets(2)
    path.unlink()
    succeed(calib)
    BlockCache.read(calib / "adaround_cache").targets(0)


def test_a_full_disk_is_refused_before_anything_is_written(calib, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    message = fail(calib)
    assert "adaround_cache: the cache needs 0." in message
    assert "0.0 MB are free" in message
    assert not (calib / "adaround_cache").exists()


def test_what_is_there_already_counts_as_room(calib, monkeypatch):
    succeed(calib)
    folder = calib / "adaround_cache"
    present = sum(p.stat().st_size for p in folder.glob("samples/*.npz"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    caching.ensure_space(folder, present + 1000)
    with pytest.raises(ArtifactError, match="free some space"):
        caching.ensure_space(folder, present + 1001)


def test_the_cache_never_mixes_with_the_trajectories(calib):
    before = files(calib)
    assert "folder of its own" in fail(calib, "--output-dir", calib, "--force")
    assert files(calib) == before


def test_other_models_and_other_weights_are_refused(calib, monkeypatch):
    assert "--model is sd3-medium" in fail(calib, "--model", "sd3-medium")
    assert "6 images wanted, it has 3" in fail(calib, "--num-images", 6)
    succeed(calib, "--model", "mmdit-shapes")
    cache, adapter = BlockCache.read(calib / "adaround_cache"), tiny_adapter()
    adapter.module.final_layer.linear.bias = adapter.module.final_layer.linear.bias + 1e-3
    with pytest.raises(CalibrationError, match="other weights"):
        cache.check(adapter)
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": adapter))
    assert "other weights" in fail(calib)


def loud_adapter():
    """Its second block writes an image stream beyond float16."""
    adapter = tiny_adapter()
    mlp = adapter.module.multimodal_transformer_blocks[1].image_transformer_block.mlp
    mlp.fc2.bias = mlp.fc2.bias + 1e7
    return adapter


def test_what_float16_cannot_hold_is_refused_by_block_and_stream(tmp_path):
    adapter = loud_adapter()
    found = make_samples(tmp_path / "c", adapter=adapter)
    plan = caching.plan(adapter, found, 1, 1)
    with pytest.raises(
        NumericsError,
        match=r"output of block multimodal_transformer_blocks\.1, stream 'image', reaches \d\.\d+e\+0[5-9]",
    ):
        caching.write(plan, adapter, tmp_path / "cache")
    assert adapter._hooks == {}
    assert files(tmp_path / "cache") == {}


def test_nan_is_refused_by_block_and_stream():
    state = {"mm0__image": mx.ones((1, 2)), "mm1__text": mx.array([[float("nan"), 1.0]])}
    with pytest.raises(NumericsError, match=r"here: the output of block b, stream 'text', reaches nan"):
        caching.half(state, ["a", "b"], "here")


def test_hooks_are_gone_after_a_failing_block(calib, monkeypatch):
    adapter = tiny_adapter()
    plan = caching.plan(adapter, Samples.read(calib), 1, 1)
    before = adapter.fingerprint

    def broken(state):
        raise RuntimeError("block failed")

    stages = list(adapter.stages)
    monkeypatch.setattr(adapter, "_stages", (*stages[:2], replace(stages[2], run=broken), stages[3]))
    with pytest.raises(RuntimeError, match="block failed"):
        caching.write(plan, adapter, calib / "adaround_cache")
    assert adapter._hooks == {}
    assert adapter.fingerprint == before
    assert isinstance(adapter.stages[1], Stage)


def test_a_model_that_runs_past_its_hooks_is_refused(calib):
    """Nothing may be skipped silently."""

    class Bypassing(MMDiTShapes):
        def run(self, state, sigma):
            return {"velocity": self.module(**state)}

    adapter = Bypassing(tiny_adapter().module)
    with pytest.raises(AdapterError, match=r"multimodal_transformer_blocks\.0.*were not reached"):
        caching.plan(adapter, Samples.read(calib), 1, 1)


def test_block_1_is_not_block_11(tmp_path):
    """Block 1 is not block 10: names must not be taken by their beginning."""
    adapter = MMDiTShapes.blank({"config": {**TINY, "depth_multimodal": 12}})
    adapter.module.update(
        tree_map(lambda x: mx.random.normal(x.shape, key=mx.random.key(x.size)) * 0.15, adapter.module.parameters())
    )
    plan = caching.plan(adapter, make_samples(tmp_path / "c", adapter=adapter), 1, STEPS)
    cache = caching.write(plan, adapter, tmp_path / "cache")
    assert [set(cache.targets(block)[0]) for block in (1, 11)] == [{"image", "text"}, {"image"}]
    assert not np.array_equal(np.array(cache.targets(1)[0]["image"]), np.array(cache.targets(11)[0]["image"]))


def test_defaults_stay_what_they_were():
    command = cli.main.get_command(None, "cache-adaround-data")
    assert {p.name: p.default for p in command.params if p.name in ("num_images", "stride")} == {
        "num_images": 5,
        "stride": 5,
    }


def test_inputs_come_from_the_trajectories_and_only_from_the_right_ones(calib, tmp_path):
    succeed(calib, "--output-dir", tmp_path / "cache")
    cache, adapter = BlockCache.read(tmp_path / "cache"), tiny_adapter()
    with pytest.raises(ArtifactError, match="--calib-dir"):
        cache.inputs(adapter)
    _, there = cache.inputs(adapter, calib)
    calib.rename(tmp_path / "moved")
    _, moved = cache.inputs(adapter, tmp_path / "moved")
    for one, other in zip(there, moved, strict=True):
        np.testing.assert_array_equal(np.array(one["image"]), np.array(other["image"]))
    make_samples(tmp_path / "other", cfg=3.0)
    with pytest.raises(ArtifactError, match="its trajectories are not those"):
        cache.inputs(adapter, tmp_path / "other")


def test_a_stream_that_changes_its_length_is_refused(calib):
    """Tokens are drawn once for all blocks."""
    adapter = tiny_adapter()
    first, second, *rest = adapter.blocks

    def halved(state):
        after = first.run(state)
        return after | {"image": after["image"][:, ::2]}

    def doubled(state):
        after = second.run(state)
        return after | {"image": mx.repeat(after["image"], 2, axis=1)}

    changed = replace(first, run=halved), replace(second, run=doubled)
    adapter._stages = (adapter.stages[0], *changed, *rest, adapter.stages[-1])
    with pytest.raises(AdapterError, match=rf"block {second.name} writes a stream 'image' of \d+ tokens, and others"):
        caching.plan(adapter, Samples.read(calib), IMAGES, STRIDE)
