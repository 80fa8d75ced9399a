"""What a ``unet/config.json`` of diffusers may say.

Every option is one of three things here: it is read; or it must be what it is by default, for other values would change
the result and are not supported; or it changes nothing when a picture is drawn. An option that is none of these is an
error. So what is built computes what diffusers computes, or is not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import AdapterError
from ...files import schema
from ...files.schema import MismatchError, Schema

HUB_IDS = (  # of Stable Diffusion 1.5: today's, and the first, which is gone
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
)
CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"

_width = schema.whole(1, schema.WIDTH)
_counts = schema.either(schema.array_of(schema.whole(1, schema.DEPTH), 1, 16), schema.whole(1, schema.DEPTH))

READ: dict[str, Schema] = {
    "sample_size": schema.maybe(schema.either(schema.array_of(schema.whole(1, 4096), 2, 2), schema.whole(1, 4096))),
    "in_channels": schema.whole(1, 4096),
    "out_channels": schema.whole(1, 4096),
    "flip_sin_to_cos": schema.flag,
    "freq_shift": schema.number(-(10**4), 10**4),
    "down_block_types": schema.array_of(schema.one_of(CROSS_DOWN, DOWN), 1, 16),
    "up_block_types": schema.array_of(schema.one_of(CROSS_UP, UP), 1, 16),
    "block_out_channels": schema.array_of(_width, 1, 16),
    "layers_per_block": _counts,
    "norm_num_groups": _width,
    "norm_eps": schema.number(0, 1),
    "cross_attention_dim": schema.either(schema.array_of(_width, 1, 16), _width),
    "transformer_layers_per_block": _counts,
    "attention_head_dim": _counts,
    "use_linear_projection": schema.flag,
}
FIXED: dict[str, tuple[Any, ...]] = {  # what each has to be
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# what only training or the precision of attention asks for, and what says something only beside an option that is off
IDLE = (
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "dropout",
    "projection_class_embeddings_input_dim",
    "upcast_attention",
)
CONFIG = schema.entries({}, READ)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 1.5's. Names and meanings are those of diffusers'
    UNet2DConditionModel, so ``attention_head_dim`` is how many heads there are.

    Raises:
        AdapterError: They do not fit each other.
    """

    sample_size: int | tuple[int, int] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)
    up_block_types: tuple[str, ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    use_linear_projection: bool = False

    def __post_init__(self) -> None:
        blocks = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "layers_per_block", *_BY_BLOCK):
            if (found := len(getattr(self, name))) != blocks:
                raise AdapterError(f"UNetConfig: {name} has {found} entries for {blocks} blocks; give one a block")
        heads = zip(self.block_out_channels, self.attention_head_dim, strict=True)
        if odd := [f"{width} channels and {count} heads" for width, count in heads if width % count]:
            raise AdapterError(f"UNetConfig: {odd[0]} in one block; expected heads that divide the channels")
        if odd := [str(width) for width in self.block_out_channels if width % self.norm_num_groups]:
            raise AdapterError(f"UNetConfig: {odd[0]} channels cannot be normed in {self.norm_num_groups} groups")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "UNetConfig") -> UNetConfig:
        """Build from plain data, as diffusers' ``config.json`` has it.

        Args:
            values: Options by name; what is not said is diffusers' default. Names that begin with "_" are not read.
            where: Where they come from, for messages.

        Raises:
            AdapterError: An option is unknown, has a value that is not supported, or does not fit the others.
        """
        said = {name: value for name, value in values.items() if not name.startswith("_")}
        for name, value in said.items():
            if name in FIXED and not any(value == one and (value is None) == (one is None) for one in FIXED[name]):
                expected = " or ".join(map(repr, FIXED[name]))
                raise AdapterError(f"{where}: a UNet with {name} {value!r:.80} is not supported; expected {expected}")
            if name not in READ and name not in FIXED and name not in IDLE:
                raise AdapterError(f"{where}: a UNet has no option {name!r:.80}; expected some of {', '.join(READ)}")
        try:
            CONFIG(said, "")
        except MismatchError as error:
            raise AdapterError(f"{where}: {error}") from error
        read = {**_DEFAULTS, **{name: value for name, value in said.items() if name in READ}}
        blocks = len(read["block_out_channels"])
        for name in ("layers_per_block", *_BY_BLOCK):
            if isinstance(read[name], int):
                read[name] = (read[name],) * blocks
        if isinstance(read["cross_attention_dim"], list):
            if len(set(read["cross_attention_dim"])) > 1:
                raise AdapterError(
                    f"{where}: cross_attention_dim {read['cross_attention_dim']} differs by block, and there is one"
                    " text; expected one number"
                )
            read["cross_attention_dim"] = read["cross_attention_dim"][0]
        try:
            plain: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in read.items()}
            return cls(**plain)
        except AdapterError as error:
            raise AdapterError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it, that ``from_dict`` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


_BY_BLOCK = ("transformer_layers_per_block", "attention_head_dim")
_DEFAULTS: dict[str, Any] = {  # of diffusers, where they are not those of Stable Diffusion 1.5
    **{field.name: field.default for field in fields(UNetConfig)},
    "sample_size": None,
    "cross_attention_dim": 1280,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
}
SD15 = UNetConfig()
