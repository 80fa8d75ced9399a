"""The sizes of an MMDiT, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import AdapterError
from ...files import schema

GELUS = ("exact", "tanh")
LATER = ("dual_attention_layers", "key_bias", "gelu")  # said only where they are not the default: 0.2.0 knows none

CONFIG = schema.entries(
    {},
    {
        "num_heads": schema.whole(1, schema.WIDTH),
        "depth_multimodal": schema.whole(1, schema.DEPTH),
        "hidden_size": schema.whole(1, schema.WIDTH),
        "mlp_ratio": schema.whole(1, 64),
        "vae_latent_dim": schema.whole(1, 4096),
        "patch_size": schema.whole(1, 64),
        "max_latent_resolution": schema.whole(1, 4096),
        "pooled_text_embed_dim": schema.whole(1, schema.WIDTH),
        "token_level_text_embed_dim": schema.whole(1, schema.WIDTH),
        "frequency_embed_dim": schema.whole(2, schema.WIDTH),
        "max_period": schema.whole(1),
        "layer_norm_eps": schema.number(0, 1),
        "use_qk_norm": schema.flag,
        "dual_attention_layers": schema.array_of(schema.whole(0, schema.DEPTH)),
        "key_bias": schema.flag,
        "gelu": schema.one_of(*GELUS),
    },
)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are those of SD3-Medium as DiffusionKit has it.

    Attributes:
        num_heads: Of each attention.
        depth_multimodal: How many blocks.
        hidden_size: Channels of both streams.
        mlp_ratio: Channels inside of an MLP, over ``hidden_size``.
        vae_latent_dim: Channels of a latent.
        patch_size: Side of the square of latents that is a token.
        max_latent_resolution: Side of the position table, in tokens; diffusers' ``pos_embed_max_size``.
        pooled_text_embed_dim: Channels of the pooled text embedding.
        token_level_text_embed_dim: Channels of a text token.
        frequency_embed_dim: Sines and cosines of the timestep.
        max_period: The longest of their periods.
        layer_norm_eps: Of all layer norms.
        use_qk_norm: Whether queries and keys are normed head by head.
        dual_attention_layers: Blocks whose image tokens have a second attention, to themselves.
        key_bias: Whether the projections of keys have a bias.
        gelu: Of the MLPs, "exact" or "tanh".
    """

    num_heads: int = 24
    depth_multimodal: int = 24
    hidden_size: int = 1536
    mlp_ratio: int = 4
    vae_latent_dim: int = 16
    patch_size: int = 2
    max_latent_resolution: int = 192
    pooled_text_embed_dim: int = 2048
    token_level_text_embed_dim: int = 4096
    frequency_embed_dim: int = 256
    max_period: int = 10000
    layer_norm_eps: float = 1e-6
    use_qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()
    key_bias: bool = False
    gelu: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers))  # JSON has lists
        if self.hidden_size % self.num_heads:
            raise AdapterError(
                f"MMDiTConfig: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if none := [layer for layer in self.dual_attention_layers if not 0 <= layer < self.depth_multimodal]:
            raise AdapterError(
                f"MMDiTConfig: dual_attention_layers {none} are none of the {self.depth_multimodal} blocks"
            )
        if self.gelu not in GELUS:
            raise AdapterError(f"MMDiTConfig: gelu {self.gelu!r}; expected one of {[*GELUS]}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """Build from plain data; raises AdapterError on a key that this architecture does not have."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise AdapterError(f"MMDiTConfig: unknown keys {unknown}; known keys are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``from_dict``."""
        said = asdict(self) | {"dual_attention_layers": list(self.dual_attention_layers)}
        usual = {f.name: f.default for f in fields(self)} | {"dual_attention_layers": []}
        return {name: value for name, value in said.items() if name not in LATER or value != usual[name]}


SD3_MEDIUM = MMDiTConfig()
