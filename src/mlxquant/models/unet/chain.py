"""The UNet as a chain of stages, what can be folded into what, and which of its layers want care."""

from __future__ import annotations

import mlx.core as mx

from ...recipes.roles import Role
from ..edges import Edge, Fold
from ..stages import Stage, State
from .network import UNet

PICTURE, SKIP = "x.{}", "skip.{}"  # in states: by how often the picture was halved, and in running order


def unet_stages(model: UNet) -> tuple[Stage, ...]:
    """The chain: ``embed``; one stage for each residual block with the transformer after it, and one for each change
    of size; ``head``.

    States hold one picture [B,H,W,C], whose name says its size, time [B,4C], text [B,T,E] and the skips that are still
    to be read. Whatever writes a skip hands the very same array on as the picture.
    """
    stages, count = [Stage("embed", ("conv_in", "time_embedding"), lambda state: _embed(model, state))], 1
    last = len(model.down_blocks) - 1
    for i, block in enumerate(model.down_blocks):
        for j in range(len(block.resnets)):
            stages.append(_down_pair(model, i, j, count))
            count += 1
        if "downsamplers" in block:
            stages.append(_downsample(model, i, count))
            count += 1
    stages += [_mid_pair(model, j, last) for j in range(len(model.mid_block.resnets))]
    for i, block in enumerate(model.up_blocks):
        for j in range(len(block.resnets)):
            count -= 1
            stages.append(_up_pair(model, i, j, last - i, count))
        if "upsamplers" in block:
            stages.append(_upsample(model, i, last - i, count - 1))
    picture = PICTURE.format(0)
    head = Stage("head", ("conv_norm_out", "conv_out"), lambda state: {"velocity": model.head(state[picture])})
    return (*stages, head)


def _embed(model: UNet, state: State) -> State:
    x = model.conv_in(state["latent"])
    time = model.embed_time(state["t"])
    return {PICTURE.format(0): x, "time": time, "text": state["text"], SKIP.format(0): x}


def _without(state: State, key: str) -> State:
    return {other: value for other, value in state.items() if other != key}


def _pair(block: str, index: int) -> tuple[str, tuple[str, ...]]:
    """The name of a stage, and what it uses."""
    return f"{block}.{index}", (f"{block}.resnets.{index}", f"{block}.attentions.{index}")


def _down_pair(model: UNet, i: int, j: int, skip: int) -> Stage:
    picture = PICTURE.format(i)

    def run(state: State) -> State:
        x = model.down_blocks[i].pair(j, state[picture], state["time"], state["text"])
        return state | {picture: x, SKIP.format(skip): x}

    return Stage(*_pair(f"down_blocks.{i}", j), run)


def _downsample(model: UNet, i: int, skip: int) -> Stage:
    path, picture = f"down_blocks.{i}.downsamplers.0", PICTURE.format(i)

    def run(state: State) -> State:
        x = model.down_blocks[i].downsamplers[0](state[picture])
        return _without(state, picture) | {PICTURE.format(i + 1): x, SKIP.format(skip): x}

    return Stage(path, (path,), run)


def _mid_pair(model: UNet, j: int, level: int) -> Stage:
    picture = PICTURE.format(level)

    def run(state: State) -> State:
        return state | {picture: model.mid_block.pair(j, state[picture], state["time"], state["text"])}

    return Stage(*_pair("mid_block", j), run)


def _up_pair(model: UNet, i: int, j: int, level: int, skip: int) -> Stage:
    picture, read = PICTURE.format(level), SKIP.format(skip)

    def run(state: State) -> State:
        x = mx.concatenate([state[picture], state[read]], axis=-1)
        return _without(state, read) | {picture: model.up_blocks[i].pair(j, x, state["time"], state["text"])}

    return Stage(*_pair(f"up_blocks.{i}", j), run)


def _upsample(model: UNet, i: int, level: int, skip: int) -> Stage:
    path, picture = f"up_blocks.{i}.upsamplers.0", PICTURE.format(level)

    def run(state: State) -> State:
        _, height, width, _ = state[SKIP.format(skip)].shape  # what it meets next
        x = model.up_blocks[i].upsamplers[0](state[picture], height, width)
        return _without(state, picture) | {PICTURE.format(level - 1): x}

    return Stage(path, (path,), run)


def unet_edges(model: UNet) -> tuple[Edge, ...]:
    """Who reads the same tensor in the transformers: a group norm can be divided before ``proj_in``, layer norms before
    attention and GEGLU. Values go to ``to_out`` head by head; all keys and values of a block read the text. GEGLU is
    linear in the half that is no gate. Between norm, SiLU and convolution nothing can be folded.
    """
    blocks = [
        *((f"down_blocks.{i}", block) for i, block in enumerate(model.down_blocks)),
        ("mid_block", model.mid_block),
        *((f"up_blocks.{i}", block) for i, block in enumerate(model.up_blocks)),
    ]
    edges = list[Edge]()
    for path, block in blocks:
        for j, transformer in enumerate(block.get("attentions", [])):
            at, width = f"{path}.attentions.{j}", transformer.norm.dims
            edges.append(Edge((f"{at}.proj_in",), (Fold(f"{at}.norm", 0, width),)))
            for k, one in enumerate(transformer.transformer_blocks):
                edges += _transformer_edges(f"{at}.transformer_blocks.{k}", width, one.attn1.heads)
    return tuple(edges)


def _transformer_edges(b: str, width: int, heads: int) -> list[Edge]:
    def out(name: str) -> Edge:
        return Edge((f"{b}.{name}.to_out.0",), (Fold(f"{b}.{name}.to_v", 0, width),), mixes=width // heads)

    return [
        Edge(tuple(f"{b}.attn1.to_{name}" for name in "qkv"), (Fold(f"{b}.norm1", 0, width),)),
        out("attn1"),
        Edge((f"{b}.attn2.to_q",), (Fold(f"{b}.norm2", 0, width),)),
        Edge((f"{b}.attn2.to_k", f"{b}.attn2.to_v")),
        out("attn2"),
        Edge((f"{b}.ff.net.0.proj",), (Fold(f"{b}.norm3", 0, width),)),
        Edge((f"{b}.ff.net.2",), (Fold(f"{b}.ff.net.0.proj", 0, 4 * width),)),
    ]


def unet_role(path: str) -> str:
    """What a layer of a UNet is for, by the names that diffusers gives them; see ``Adapter.role``. Convolutions of
    residual blocks and changes of size are "mlp": most of the weights, as MLPs are elsewhere.

    ``conv_shortcut`` wants care: it alone reads the stream as it is, a picture and a skip side by side with different
    ranges, which one step for both serves badly (Q-Diffusion, arXiv 2302.04304 section 4.3, which splits them). It has
    2.7 % of the weights of Stable Diffusion 1.5.
    """
    if path.endswith(".conv_shortcut"):
        return Role("shortcut", careful=True)
    if path.endswith(".time_emb_proj"):
        return "modulation"
    if path.startswith(("conv_in", "time_embedding")):
        return "embedder"
    if path.startswith("conv_out"):
        return "output"
    return "attention" if ".attn" in path else "mlp"
