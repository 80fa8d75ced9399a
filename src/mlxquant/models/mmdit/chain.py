"""An MMDiT as a chain of stages, what can be folded into what, and which of its layers want care."""

from __future__ import annotations

from ..edges import Edge, Fold
from ..stages import Stage, State
from .config import MMDiTConfig
from .network import MMDiT

PATCHES = {  # no recipe takes what makes tokens of a latent
    "x_embedder": "makes the tokens that every block reads, and is a thousandth of the weights",
    "x_pos_embedder": "holds positions, a row for each, and is not multiplied",
}


def mmdit_stages(model: MMDiT) -> tuple[Stage, ...]:
    """The chain of an MMDiT: ``embed``, one stage a block, ``head``.

    States hold the latent [B,H,W,C], image [B,N,D], text [B,T,D] and c [B,D]; the last block drops the text. A state is
    changed by what a block returns, never in place, so that what passes through stays the very same object.
    """

    def embed(state: State) -> State:
        image, text, c = model.embed(state["latent"], state["tokens"], state["pooled"], state["t"])
        return {"latent": state["latent"], "image": image, "text": text, "c": c}

    def block(index: int) -> Stage:
        prefix = f"multimodal_transformer_blocks.{index}"

        def run(state: State) -> State:
            image, text = model.multimodal_transformer_blocks[index](state["image"], state["text"], state["c"])
            kept = {k: v for k, v in state.items() if k != "text"} | {"image": image}
            return kept if text is None else kept | {"text": text}

        return Stage(prefix, (prefix,), run)

    def head(state: State) -> State:
        _, height, width, _ = state["latent"].shape
        return {"velocity": model.head(state["image"], state["c"], height, width)}

    embedders = ("x_embedder", "x_pos_embedder", "y_embedder", "t_embedder", "context_embedder")
    blocks = [block(i) for i in range(model.config.depth_multimodal)]
    return (Stage("embed", embedders, embed), *blocks, Stage("head", ("final_layer",), head))


def mmdit_edges(config: MMDiTConfig) -> tuple[Edge, ...]:
    """Who reads the same tensor in an MMDiT's blocks: q, k, v and fc1 read what adaLN modulates; o_proj reads a mixture
    of both streams' values, head by head, so both streams' o_proj change together, while that of a second attention
    reads a mixture of its own values; between GELU and fc2 channels can only change places.
    """
    d, edges = config.hidden_size, []
    for index in range(config.depth_multimodal):
        last = index == config.depth_multimodal - 1
        block = f"multimodal_transformer_blocks.{index}"
        streams = [f"{block}.{name}_transformer_block" for name in ("image", "text")]
        finished = streams[:1] if last else streams

        def modulated(stream: str, chunk: int) -> tuple[Fold, ...]:
            adaln = f"{stream}.adaLN_modulation.layers.1"
            return Fold(adaln, chunk * d, (chunk + 1) * d), Fold(adaln, (chunk + 1) * d, (chunk + 2) * d, plus_one=True)

        edges += [Edge(tuple(f"{s}.attn.{name}_proj" for name in "qkv"), modulated(s, 0)) for s in streams]
        values, head = tuple(Fold(f"{s}.attn.v_proj", 0, d) for s in streams), d // config.num_heads
        edges.append(Edge(tuple(f"{s}.attn.o_proj" for s in finished), values, mixes=head))
        if index in config.dual_attention_layers:
            own = f"{streams[0]}.attn2"
            edges.append(Edge(tuple(f"{own}.{name}_proj" for name in "qkv"), modulated(streams[0], 6)))
            edges.append(Edge((f"{own}.o_proj",), (Fold(f"{own}.v_proj", 0, d),), mixes=head))
        edges += [Edge((f"{s}.mlp.fc1",), modulated(s, 3)) for s in finished]
        wide = d * config.mlp_ratio
        edges += [Edge((f"{s}.mlp.fc2",), after="gelu", reorders=(Fold(f"{s}.mlp.fc1", 0, wide),)) for s in finished]
    return tuple(edges)


def mmdit_role(path: str) -> str:
    """What a Linear of an MMDiT is for, by the names that DiffusionKit gives them, or would; see ``Adapter.role``."""
    if "adaLN_modulation" in path:
        return "modulation"
    if ".attn." in path or ".attn2." in path:
        return "attention"
    if ".mlp.fc" in path:
        return "mlp"
    return "output" if path.startswith("final_layer") else "embedder"
