"""A PixArt as a chain of stages, what can be folded into what, and which of its layers want care."""

from __future__ import annotations

from ..edges import Edge, Fold
from ..stages import Stage, State
from .config import PixArtConfig
from .network import PixArt

PATCHES = {"pos_embed": "makes the tokens that every block reads, and is a hundred-thousandth of the weights"}
TIMES = "adaln_single"


def pixart_stages(model: PixArt, pixels: int) -> tuple[Stage, ...]:
    """The chain of a PixArt: ``embed``, one stage a block, ``head``.

    States hold the latent [B,H,W,C], image [B,N,D], text [B,T,D] with its mask [B,1,1,T], time [B,6,D], which every
    block adds its table to, and c [B,D], which the head reads of the time. Blocks write the image alone.

    Args:
        model: The transformer.
        pixels: Of a picture's side, for one of a latent.
    """

    def embed(state: State) -> State:
        latent = state["latent"]
        sides = latent.shape[1] * pixels, latent.shape[2] * pixels
        image, text, time, c = model.embed(latent, state["tokens"], state["t"], *sides)
        mask = state["mask"][:, None, None]
        return {"latent": latent, "image": image, "text": text, "mask": mask, "time": time, "c": c}

    def block(index: int) -> Stage:
        prefix = f"transformer_blocks.{index}"

        def run(state: State) -> State:
            here = model.transformer_blocks[index]
            return state | {"image": here(state["image"], state["text"], state["mask"], state["time"])}

        return Stage(prefix, (prefix,), run)

    def head(state: State) -> State:
        _, height, width, _ = state["latent"].shape
        return {"velocity": model.head(state["image"], state["c"], height, width)}

    embedders = ("pos_embed", TIMES, "caption_projection")
    blocks = [block(i) for i in range(model.config.num_layers)]
    return (Stage("embed", embedders, embed), *blocks, Stage("head", ("proj_out",), head))


def pixart_edges(config: PixArtConfig) -> tuple[Edge, ...]:
    """Who reads the same tensor in a PixArt.

    Values can be divided, and mixed inside of a head, in to_v, and channels can change places before the layer after a
    GELU. All blocks read one and the same text, so it can be divided and mixed in what projects captions, for the keys
    and values of all blocks at once.

    Nothing can take what divides the modulated input of q, k, v or of the MLP. It is ``norm(x) (1 + s + a) + h + b``:
    s and h are rows of ``adaln_single.linear``, which all blocks share, a and b those of the block's own table, which
    do not change with time. To divide ``1 + s + a`` is to divide s, and then every other block would read a divided s;
    a table cannot make up for that, because s changes with time and a does not. The norm has no gains. So these layers
    divide while they run. (One division for all blocks together would go into s and all tables; but what the blocks
    read are many tensors, each with outliers of its own, and an edge is about one.) The query of cross attention
    divides while it runs, too: it reads the stream as all blocks write it, without a norm.
    """
    d, edges = config.width, []
    captions = "caption_projection"
    edges.append(Edge((f"{captions}.linear_2",), after="gelu", reorders=(Fold(f"{captions}.linear_1", 0, d),)))
    blocks = [f"transformer_blocks.{index}" for index in range(config.num_layers)]
    readers = tuple(f"{block}.attn2.to_{name}" for block in blocks for name in "kv")
    edges.append(Edge(readers, (Fold(f"{captions}.linear_2", 0, d),), mixes=d))
    for block in blocks:
        edges.append(Edge(tuple(f"{block}.attn1.to_{name}" for name in "qkv")))
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            values = Fold(f"{attention}.to_v", 0, d)
            edges.append(Edge((f"{attention}.to_out.0",), (values,), mixes=config.attention_head_dim))
        hidden = Fold(f"{block}.ff.net.0.proj", 0, 4 * d)
        edges.append(Edge((f"{block}.ff.net.2",), after="gelu", reorders=(hidden,)))
    return tuple(edges)


def pixart_role(path: str) -> str:
    """What a Linear of a PixArt is for, by the names that diffusers gives them; see ``Adapter.role``."""
    if path == f"{TIMES}.linear":
        return "modulation"
    if ".attn1." in path or ".attn2." in path:
        return "attention"
    if ".ff." in path:
        return "mlp"
    return "output" if path == "proj_out" else "embedder"
