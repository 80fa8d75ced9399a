"""Original single files of random numbers, as Stability AI and CompVis name their tensors: written from what diffusers
names, by rules of their own, so that reading them back is a test.
"""

import mlx.core as mx

from mlxquant.layers.tree import parameters
from mlxquant.models.sd3.names import config_to_diffusers, to_diffusers

from support.sd3_transformers import random_transformer

OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
INSIDE = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}
JOINED = {"x_block.attn": "attn.to_{}", "x_block.attn2": "attn2.to_{}", "context_block.attn": "attn.add_{}_proj"}


def original_transformer(tensors, prefix="model.diffusion_model."):
    """SD3's transformer in a single file, from its tensors in diffusers."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    kinds, found = ("weight", "bias"), {}
    for name, value in tensors.items():
        place, _, kind = name.rpartition(".")
        if name == "pos_embed.pos_embed" or place in OUTSIDE:
            new = "pos_embed" if name == "pos_embed.pos_embed" else f"{OUTSIDE[place]}.{kind}"
        else:
            _, index, inside = place.split(".", 2)
            if inside not in INSIDE:
                continue
            new = f"joint_blocks.{index}.{INSIDE[inside]}.{kind}"
        if place in ("norm_out.linear", f"transformer_blocks.{depth - 1}.norm1_context.linear"):
            value = mx.concatenate(mx.split(value, 2)[::-1])
        found[prefix + new] = value
    for index in range(depth):
        for place, theirs in JOINED.items():
            for kind in kinds:
                parts = [tensors.get(f"transformer_blocks.{index}.{theirs.format(part)}.{kind}") for part in "qkv"]
                if parts[0] is not None:
                    found[f"{prefix}joint_blocks.{index}.{place}.qkv.{kind}"] = mx.concatenate(parts)
    return found


class Drawn:
    """Random tensors of a module of CompVis, by name."""

    def __init__(self, prefix, seed=0):
        self.found, self._prefix, self._key = {}, prefix, mx.random.key(seed)

    def _add(self, name, shape, scale):
        self._key, key = mx.random.split(self._key)
        self.found[f"{self._prefix}{name}"] = mx.random.normal(shape, key=key) * scale

    def convolution(self, name, out, into, side):
        self._add(f"{name}.weight", (out, into, side, side), (into * side * side) ** -0.5)
        self._add(f"{name}.bias", (out,), 0.1)

    def norm(self, name, width):
        self._add(f"{name}.weight", (width,), 0.2)
        self.found[f"{self._prefix}{name}.weight"] += 1
        self._add(f"{name}.bias", (width,), 0.1)

    def residual(self, name, before, after):
        self.norm(f"{name}.norm1", before)
        self.convolution(f"{name}.conv1", after, before, 3)
        self.norm(f"{name}.norm2", after)
        self.convolution(f"{name}.conv2", after, after, 3)
        if before != after:
            self.convolution(f"{name}.nin_shortcut", after, before, 1)


def original_autoencoder(latent=4, widths=(32, 64), layers=1, quant=False, seed=0):
    """CompVis' autoencoder in a single file; level 0 is the largest picture."""
    drawn, deepest = Drawn("first_stage_model.", seed), widths[-1]
    halves = (
        ("encoder", "down", list(enumerate(widths)), layers, 3, 2 * latent),
        ("decoder", "up", list(enumerate(widths))[::-1], layers + 1, latent, 3),
    )
    for half, way, levels, blocks, into, out in halves:
        channels = levels[0][1]
        drawn.convolution(f"{half}.conv_in", channels, into, 3)
        for level, wanted in levels:
            for index in range(blocks):
                drawn.residual(f"{half}.{way}.{level}.block.{index}", channels, wanted)
                channels = wanted
            if level != levels[-1][0]:
                drawn.convolution(f"{half}.{way}.{level}.{way}sample.conv", channels, channels, 3)
        for block in ("block_1", "block_2"):
            drawn.residual(f"{half}.mid.{block}", deepest, deepest)
        drawn.norm(f"{half}.mid.attn_1.norm", deepest)
        for name in ("q", "k", "v", "proj_out"):
            drawn.convolution(f"{half}.mid.attn_1.{name}", deepest, deepest, 1)
        drawn.norm(f"{half}.norm_out", channels)
        drawn.convolution(f"{half}.conv_out", out, channels, 3)
    if quant:
        drawn.convolution("quant_conv", 2 * latent, 2 * latent, 1)
        drawn.convolution("post_quant_conv", latent, latent, 1)
    return drawn.found


def write_sd3_file(path, said, **more):
    """A single file of SD3 with a random transformer of a configuration, a small autoencoder and ``more`` tensors;
    returns the transformer.
    """
    model = random_transformer(said)
    tensors = original_transformer(to_diffusers(parameters(model), model.config))
    mx.save_safetensors(str(path), {**tensors, **original_autoencoder(said["in_channels"]), **more})
    return model, config_to_diffusers(model.config)
