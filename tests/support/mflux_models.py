"""Small transformers of mflux, and calls as its pipelines make them: two sizes of pictures, each with a guided pair."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn


def mflux(place):
    """What stands at ``models.….Name`` in the package."""
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"mflux.{module}"), name)


def normal(seed, *shape):
    return mx.random.normal(shape, key=mx.random.key(seed))


def flux2():
    return mflux("models.flux2.model.flux2_transformer.transformer.Flux2Transformer")(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8),
    )  # fmt: skip


def flux2_call(seed, side, tokens):
    ids = mx.stack([mx.zeros(side**2), *mx.divmod(mx.arange(side**2), side), mx.zeros(side**2)], axis=1)
    return {
        "hidden_states": normal(seed, 1, side**2, 64), "encoder_hidden_states": normal(seed + 100, 1, tokens, 64),
        "timestep": mx.array([0.9 - 0.1 * side]), "img_ids": ids, "txt_ids": mx.zeros((tokens, 4)), "guidance": None,
    }  # fmt: skip


def z_image():
    return mflux("models.z_image.model.z_image_transformer.transformer.ZImageTransformer")(
        in_channels=16, dim=96, n_layers=2, n_refiner_layers=2, n_heads=2, cap_feat_dim=64, axes_dims=[16, 16, 16],
        axes_lens=[64, 64, 64],
    )  # fmt: skip


def z_image_call(seed, side, tokens):
    return {
        "timestep": 0.1 * side, "x": normal(seed, 16, 1, 2 * side, 2 * side),
        "cap_feats": normal(seed + 100, tokens, 64), "sigmas": mx.array([1.0, 0.6, 0.3, 0.0]),
    }  # fmt: skip


def qwen_image():
    return mflux("models.qwen.model.qwen_transformer.qwen_transformer.QwenTransformer")(
        num_layers=2, num_attention_heads=1, joint_attention_dim=64
    )


def qwen_image_call(seed, side, tokens):
    models = mflux("models.common.config.model_config.ModelConfig")
    size = {"height": 16 * side, "width": 16 * side}
    config = mflux("models.common.config.config.Config")(models.qwen_image(), num_inference_steps=2, **size)
    return {
        "t": side % 2, "config": config, "hidden_states": normal(seed, 1, side**2, 64),
        "encoder_hidden_states": normal(seed + 100, 1, tokens, 64), "encoder_hidden_states_mask": mx.ones((1, tokens)),
    }  # fmt: skip


def flux3():
    return mflux("models.flux3.model.flux3_transformer.flux3_transformer.Flux3Transformer")(
        in_channels=64, cond_in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8),
    )  # fmt: skip


def flux3_call(seed, side, tokens):
    call = flux2_call(seed, side, tokens)
    del call["guidance"]
    return {**call, "target_timestep": mx.array([0.2])}


@dataclass(frozen=True)
class Host:
    """A transformer of mflux.

    Attributes:
        build: Makes it, its weights by MLX's global seed.
        call: The arguments of a call: from a seed, the side of a picture in tokens and the number of text tokens.
        blocks: What it is cut into, in the order in which they run.
        idle: Layers that a call without reference pictures does not use, or to no effect.
        widths: How weights are divided: all input widths of Z-Image's are no multiples of 64.
    """

    build: Callable[[], nn.Module]
    call: Callable[[int, int, int], dict]
    blocks: tuple[str, ...]
    idle: tuple[str, ...] = ()
    widths: str = "-g64"

    def module(self):
        """The module, the same every time."""
        mx.random.seed(0)
        module = self.build()
        mx.eval(module.parameters())
        return module

    def run(self, module):
        """Two sizes, each with a prompt and none."""
        return [module(**call) for call in self.calls()]

    def calls(self):
        calls = []
        for side, tokens in ((4, 6), (5, 9)):
            prompt, empty = self.call(side, side, tokens), self.call(side, side, 4)
            calls += [prompt, empty]
        return calls


HOSTS = {
    "FLUX.2": Host(
        flux2,
        flux2_call,
        ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"),
    ),
    "Z-Image": Host(
        z_image,
        z_image_call,
        ("noise_refiner.0", "noise_refiner.1", "context_refiner.0", "context_refiner.1", "layers.0", "layers.1"),
        widths="",
    ),
    "Qwen-Image": Host(qwen_image, qwen_image_call, ("transformer_blocks.0", "transformer_blocks.1")),
    "FLUX.3": Host(
        flux3,
        flux3_call,
        (
            "mode_blocks.image.0", "txt_mode_blocks.0", "mode_blocks.image.1", "txt_mode_blocks.1",
            "single_transformer_blocks.0", "single_transformer_blocks.1",
        ),
        ("image_cond",),
    ),
}  # fmt: skip
