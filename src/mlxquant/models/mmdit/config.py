"""The sizes of an MMDiT, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import AdapterError
from ...files import schema

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
    },
)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are SD3-Medium's."""

    num_heads: int = 24
    depth_multimodal: int = 24
    hidden_size: int = 1536
    mlp_ratio: int = 4
    vae_latent_dim: int = 16
    patch_size: int = 2
    max_latent_resolution: int = (
        192  # pixels of the latent grid; the position table has (this) ** 2 rows, as in DiffusionKit
    )
    pooled_text_embed_dim: int = 2048
    token_level_text_embed_dim: int = 4096
    frequency_embed_dim: int = 256
    max_period: int = 10000
    layer_norm_eps: float = 1e-6
    use_qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise AdapterError(
                f"MMDiTConfig: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """Build from plain data; raises AdapterError on a key that this architecture does not have."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise AdapterError(f"MMDiTConfig: unknown keys {unknown}; known keys are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SD3_MEDIUM = MMDiTConfig()
