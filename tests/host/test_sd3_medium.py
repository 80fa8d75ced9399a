"""The adapter on DiffusionKit's modules: its contract, and that what it draws is what DiffusionKit's own pipeline
draws.
"""

import gc
import subprocess
import sys
import weakref

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models import prompt_memory
from mlxquant.models.diffusionkit import text_encoders
from mlxquant.models.diffusionkit.package import host
from mlxquant.sweep.folding import divide

from support.adapter_contract import AdapterContract

pytestmark = pytest.mark.diffusionkit
SIZE = 64
PROMPTS = ("a cat on a mat", "two red cubes")


@pytest.fixture(scope="module")
def model(sd3_folder):
    return mq.load(f"diffusionkit:{sd3_folder}", size=SIZE)


@pytest.fixture
def adapter(model):
    return mq.Model(model.clone()).adapter


@pytest.fixture
def their_pipeline(diffusionkit, tiny_host, random_sd3):
    """DiffusionKit's own, with everything but the transformer in float32, as we have it on the CPU."""
    pipe = diffusionkit.DiffusionPipeline(w16=True, shift=3.0, low_memory_mode=False, model_version=random_sd3.MMDIT)
    for name in ("clip_l", "clip_g", "t5_encoder", "decoder", "encoder"):
        getattr(pipe, name).set_dtype(mx.float32)
    return pipe


class TestContract(AdapterContract):
    @pytest.fixture(scope="class")
    @classmethod
    def adapter(cls, model):
        return model.adapter

    @classmethod
    def make_adapter(cls):
        raise AssertionError("the fixture above makes it")

    def whole(self, adapter, latent, conditioning, t):
        adapter.module.cache_modulation_params(conditioning["pooled"], t[:1])
        return adapter.module(latent, conditioning["tokens"][:, :, None], t)


def test_texts_are_encoded_as_by_diffusionkit(model, their_pipeline):
    theirs = their_pipeline.encode_text(PROMPTS[0], 5.0, PROMPTS[1])
    ours = model.adapter.encode(PROMPTS)
    for mine, other in zip((ours["tokens"], ours["pooled"]), theirs, strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(np.array(mine), np.array(other.astype(mx.float32)), atol=2e-4)


@pytest.mark.parametrize("cfg", [4.0, 1.5])
def test_a_picture_is_diffusionkits(model, their_pipeline, cfg):
    theirs, _ = their_pipeline.generate_image(
        PROMPTS[0], num_steps=3, cfg_weight=cfg, latent_size=(8, 8), seed=5, verbose=False
    )
    assert close(model.generate(PROMPTS[0], seed=5, steps=3, cfg=cfg), theirs)
    ours, _ = model.adapter.pipeline().generate_image(
        PROMPTS[0], num_steps=3, cfg_weight=cfg, latent_size=(8, 8), seed=5
    )
    assert close(ours, theirs)


def close(one, other):
    """Equal to within one of 255 levels."""
    return np.abs(np.array(one, np.int32) - np.array(other, np.int32)).max() <= 1


def test_the_pipeline_draws_from_a_picture(model, their_pipeline, tmp_path):
    """``denoise`` below 1 goes through the VAE's encoder."""
    model.generate(PROMPTS[1], seed=1, steps=2).save(tmp_path / "start.png")
    settings = {
        "num_steps": 4,
        "cfg_weight": 4.0,
        "latent_size": (8, 8),
        "seed": 5,
        "image_path": str(tmp_path / "start.png"),
        "denoise": 0.6,
    }
    theirs, _ = their_pipeline.generate_image(PROMPTS[0], verbose=False, **settings)
    ours, _ = model.adapter.pipeline().generate_image(PROMPTS[0], **settings)
    assert close(ours, theirs)


@pytest.mark.parametrize("cfg", [0.0, 0.7, 1.0])
def test_any_guidance_runs_in_both(model, cfg):
    """DiffusionKit's own makes a negative prompt where none is used, and fails."""
    ours = np.array(model.generate(PROMPTS[0], seed=5, steps=2, cfg=cfg))
    image, _ = model.adapter.pipeline().generate_image(
        PROMPTS[0], num_steps=2, cfg_weight=cfg, latent_size=(8, 8), seed=5, verbose=True
    )
    if cfg == 0:  # without guidance DiffusionKit follows the prompt, and we the empty one
        ours = np.array(model.generate(PROMPTS[0], seed=5, steps=2, cfg=1.0))
    assert close(ours, image)


def test_its_transformer_is_whole_after_sampling(adapter):
    """DiffusionKit empties the modulation layers, and restores those of the checkpoint: a fold would be lost."""
    edge = next(edge for edge in adapter.edges() if edge.folds)
    divide(adapter.module, edge, np.linspace(0.5, 2, 128))
    before = {name: np.array(value) for name, value in parameters(adapter.module).items()}
    pipe = adapter.pipeline()
    first, _ = pipe.generate_image(PROMPTS[0], num_steps=2, cfg_weight=4.0, latent_size=(8, 8), seed=5)
    pipe.generate_image(PROMPTS[1], num_steps=3, cfg_weight=4.0, latent_size=(8, 8), seed=6)
    again, _ = pipe.generate_image(PROMPTS[0], num_steps=2, cfg_weight=4.0, latent_size=(8, 8), seed=5)
    np.testing.assert_array_equal(np.array(first), np.array(again))
    after = parameters(adapter.module)
    assert after.keys() == before.keys()
    assert all(np.array_equal(np.array(after[name]), before[name]) for name in before)
    assert not any("to_offload" in name for name, _ in adapter.module.named_modules())


def test_its_own_call_refuses_a_batch_of_mixed_timesteps(adapter):
    latent, text = mx.zeros((2, 8, 8, 16)), adapter.encode(PROMPTS)
    adapter.module.cache_modulation_params(text["pooled"], mx.array([500.0, 300.0]))
    with pytest.raises(AdapterError, match=r"one timestep at a time, found \[300.0, 500.0\]"):
        adapter.module(latent, text["tokens"][:, :, None], mx.array([500.0, 300.0]))


def test_a_failing_block_leaves_no_modulations_behind(adapter):
    block = adapter.module.multimodal_transformer_blocks[1]
    block.sdpa = None
    text = adapter.encode(PROMPTS)
    with pytest.raises(TypeError):
        adapter.velocity(mx.zeros((2, 8, 8, 16)), text, 0.5)
    assert not any(hasattr(m, "_modulation_params") for _, m in adapter.module.named_modules())


def test_nothing_is_left_patched_in_the_process(diffusionkit, sd3_folder):
    """Two adapters later DiffusionKit's classes, configs and the logging of the process are what they were."""
    kit = host()
    modules = (kit.mmdit, kit.model_io, kit.t5, kit.vae, kit.clip, kit.config, kit.package)
    before, numbers = [dict(vars(m)) for m in modules], np.random.get_state()[1].copy()
    classes = [
        dict(vars(kit.mmdit.MMDiT)),
        dict(vars(kit.mmdit.MultiModalTransformerBlock)),
        dict(vars(kit.t5.TransformerEncoder)),
    ]
    config = dict(vars(kit.config.SD3_2b))
    mq.load(f"diffusionkit:{sd3_folder}", size=SIZE).generate(PROMPTS[0], steps=1)
    mq.load(f"diffusionkit:{sd3_folder}", size=SIZE).adapter.pipeline().generate_image(
        PROMPTS[0], num_steps=1, cfg_weight=3.0, latent_size=(8, 8), seed=1
    )
    assert [dict(vars(m)) for m in modules] == before
    assert [
        dict(vars(kit.mmdit.MMDiT)), dict(vars(kit.mmdit.MultiModalTransformerBlock)),
        dict(vars(kit.t5.TransformerEncoder))
    ] == classes  # fmt: skip
    assert dict(vars(kit.config.SD3_2b)) == config
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)


def test_the_log_of_the_process_is_its_own():
    """DiffusionKit adds a handler to the root logger, and coremltools warns of what does not concern us."""
    code = "import logging, mlxquant.models.diffusionkit.package as d; d.host(); print(logging.getLogger().handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "coremltools" not in done.stderr


def test_a_pipeline_and_its_model_go_when_they_are_dropped(sd3_folder):
    model = mq.load(f"diffusionkit:{sd3_folder}", size=SIZE)
    pipe = model.adapter.pipeline()
    pipe.ensure_models_are_loaded()
    pipe.unload_t5()
    pipe.generate_image(PROMPTS[0], num_steps=1, cfg_weight=3.0, seed=1)
    assert not any(hasattr(m, "_modulation_params") for _, m in model.adapter.module.named_modules())
    gone = weakref.ref(model.adapter)
    gc.disable()
    try:
        del pipe, model
        assert gone() is None
    finally:
        gc.enable()


def watched_encoders(patch):
    """The list of prompts of every call of the text encoders from now on."""
    calls, encode = [], text_encoders.TextEncoders.encode
    watched = lambda self, prompts: calls.append(list(prompts)) or encode(self, prompts)  # noqa: E731
    patch.setattr(text_encoders.TextEncoders, "encode", watched)
    return calls


def test_prompts_are_encoded_once_and_encoders_released(sd3_folder, monkeypatch):
    """Twins share what was encoded; the encoders are gone after each call, T5's layers one by one."""
    calls, model = watched_encoders(monkeypatch), mq.load(f"diffusionkit:{sd3_folder}", size=SIZE)
    model.images([mq.Prompt(1, PROMPTS[0]), mq.Prompt(2, PROMPTS[1]), mq.Prompt(3, PROMPTS[0])], steps=1)
    mx.clear_cache()
    held = mx.get_active_memory()
    mq.Model(model.clone()).images([mq.Prompt(4, PROMPTS[1])], steps=1)
    assert calls == [[*PROMPTS, ""]]
    model.adapter.encode(["something else"])
    assert calls[1:] == [["something else"]]
    mx.clear_cache()
    assert mx.get_active_memory() - held < 1.01 * (589 * 4096 * 4 + 4096)  # what was encoded, and no weights


def test_more_prompts_than_are_kept_are_encoded_once(sd3_folder, monkeypatch):

    monkeypatch.setattr(prompt_memory, "KEPT", 2)
    calls, model = watched_encoders(monkeypatch), mq.load(f"diffusionkit:{sd3_folder}", size=SIZE)
    model.images([mq.Prompt(n, f"number {n}") for n in range(5)], steps=1)
    mq.calibrate(model, [mq.Prompt(n, f"number {n}") for n in range(5)], steps=1)
    assert [len(prompts) for prompts in calls] == [6]


def test_half_precision_encodes_the_same(model):
    """What Metal computes in; on the CPU it is slow."""
    files = text_encoders.Files(model.adapter.place)
    exact, half = (text_encoders.TextEncoders(files, dtype).encode(PROMPTS) for dtype in (mx.float32, mx.float16))
    for pair in zip(exact, half, strict=True):
        for one, other in zip(*pair, strict=True):
            assert other.dtype == mx.float16
            np.testing.assert_allclose(np.array(one), np.array(other.astype(mx.float32)), atol=2e-2)


def test_an_unknown_character_is_named(model):
    with pytest.raises(AdapterError, match="CLIP's tokenizer has no token for '☃"):
        model.generate("a snowman ☃", steps=1)


@pytest.mark.parametrize("size", [8, 40, 1024])
def test_a_size_that_it_cannot_draw_is_refused(model, size):
    with pytest.raises(AdapterError, match="multiple of 16 pixels, at most 256"):
        mq.Model(model.adapter.twin()).adapter.resize(size)


def test_other_checkpoints_are_refused(sd3_folder, random_sd3, tmp_path):
    arrays = mx.load(str(sd3_folder / "sd3_medium.safetensors"))
    prefix = "model.diffusion_model."
    wrong = {
        "holds no SD3 transformer": {"double_blocks.0.img_attn.qkv.weight": mx.zeros((3, 3))},
        "is of an SD3.5 transformer": {**arrays, prefix + "joint_blocks.0.x_block.attn2.qkv.weight": mx.zeros((3, 3))},
        "tensors are missing, such as final_layer.linear.bias": {
            k: v for k, v in arrays.items() if "final_layer.linear.bias" not in k
        },
        "has shape": {**arrays, prefix + "final_layer.linear.bias": mx.zeros((3,))},
        "lacks a tensor": {k: v for k, v in arrays.items() if "y_embedder.mlp.0.weight" not in k},
    }
    for message, tensors in wrong.items():
        mx.save_safetensors(str(tmp_path / "sd3_medium.safetensors"), tensors)
        with pytest.raises(ArtifactError, match=message):
            mq.load(f"diffusionkit:{tmp_path}")
    (tmp_path / "sd3_medium.safetensors").write_bytes((sd3_folder / "sd3_medium.safetensors").read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a safetensors file, or a damaged one"):
        mq.load(f"diffusionkit:{tmp_path}")


def test_pictures_need_not_be_squares(model):
    """A wide picture and its calibration; in DiffusionKit's own pipeline it is the same."""
    wide = mq.Model(model.clone())
    wide.adapter.resize((96, 64))
    assert (wide.adapter.size, wide.adapter.latent_shape[:2]) == ((96, 64), (8, 12))
    ours = wide.generate(PROMPTS[0], seed=5, steps=2, cfg=4.0, negative=PROMPTS[1])
    theirs, _ = wide.adapter.pipeline().generate_image(
        PROMPTS[0], num_steps=2, cfg_weight=4.0, negative_text=PROMPTS[1], latent_size=(8, 12), seed=5
    )
    assert ours.size == theirs.size == (96, 64)
    assert close(ours, theirs)
    assert not close(ours, wide.generate(PROMPTS[0], seed=5, steps=2, cfg=4.0))
    calib = mq.calibrate(wide, 2, steps=2, negative=PROMPTS[1])
    quantized = mq.quantize(wide, calib, "rtn-w4a8")
    assert quantized.adapter.describe()["size"] == [96, 64]
    again = type(wide.adapter).described(quantized.adapter.describe())
    assert again.size == (96, 64)
    assert model.adapter.twin().describe()["size"] == SIZE
    with pytest.raises(AdapterError, match="multiple of 16 pixels, at most 256; 40 is none"):
        wide.adapter.resize((96, 40))
