"""What ``transformer/config.json`` of a PixArt says, as diffusers' PixArtTransformer2DModel reads it.

Every option is one of three things here: it is read; or it must be what it is in every PixArt, for another value would
change the function and is not supported; or it changes nothing while a model draws. What is none of these is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import AdapterError
from ...files import schema
from ...files.schema import MismatchError

ALPHA = ("PixArt-alpha/PixArt-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-512x512")  # hub ids, the usual one first
SIGMA = ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
CONDITIONED = 128  # the sample_size whose models read the picture's resolution and aspect ratio
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second in folders that older releases wrote

_width = schema.whole(1, schema.WIDTH)
READ = {
    "num_attention_heads": _width,
    "attention_head_dim": _width,
    "in_channels": schema.whole(1, 4096),
    "out_channels": schema.maybe(schema.whole(1, 8192)),
    "num_layers": schema.whole(1, schema.DEPTH),
    "attention_bias": schema.flag,
    "sample_size": schema.whole(1, 4096),
    "patch_size": schema.whole(1, 64),
    "norm_eps": schema.number(0, 1),
    "interpolation_scale": schema.maybe(schema.number(1e-3, 1e3)),
    "use_additional_conditions": schema.maybe(schema.flag),
    "caption_channels": _width,
}
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
    "upcast_attention": False,
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
}
IDLE = ("dropout", "norm_num_groups", "num_embeds_ada_norm", "use_linear_projection")  # while it draws
WIDTH = "cross_attention_dim"  # which has to be the width of the model

CONFIG = schema.entries({"caption_channels": _width}, READ)  # of what ``PixArtConfig.to_dict`` gives


@dataclass(frozen=True)
class PixArtConfig:
    """Sizes of a PixArt under diffusers' names; the defaults are diffusers', which are those of the model for 1024
    pixels.

    Attributes:
        num_attention_heads: Heads.
        attention_head_dim: Channels of each.
        in_channels: Of a latent.
        out_channels: Of a prediction; twice those of a latent where it has a learned variance, None for as many.
        num_layers: Blocks.
        attention_bias: Whether queries, keys and values have biases.
        sample_size: Side of the latents that it was trained on.
        patch_size: Side of a token, in latents.
        norm_eps: Of the norms in blocks.
        interpolation_scale: By which positions are divided; None for ``sample_size / 64``.
        use_additional_conditions: Whether it reads resolution and aspect ratio; None for what ``sample_size`` says.
        caption_channels: Of the text encoder's tokens.

    Raises:
        AdapterError: The options do not go together.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int = 4096

    def __post_init__(self) -> None:
        conditioned = self.sample_size == CONDITIONED
        usual = {
            "out_channels": self.in_channels,
            "interpolation_scale": max(self.sample_size // 64, 1),
            "use_additional_conditions": conditioned,
        }
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.use_additional_conditions and not conditioned:
            raise AdapterError(
                f"use_additional_conditions with sample_size {self.sample_size}: a model reads resolution and aspect"
                f" ratio at sample_size {CONDITIONED} only, and diffusers' pipeline has none for this one"
            )
        if self.sample_size % self.patch_size:
            raise AdapterError(f"sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}")
        parts = 12 if self.use_additional_conditions else 4
        if self.width % parts:
            raise AdapterError(
                f"{self.num_attention_heads} heads of {self.attention_head_dim} channels are {self.width} in all;"
                f" expected a multiple of {parts}, for positions and conditions"
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of a prediction is a variance, by the rule of diffusers' pipeline."""
        assert self.out_channels is not None
        return self.out_channels // 2 == self.in_channels

    @classmethod
    def from_config(cls, said: Mapping[str, Any], where: str = "transformer/config.json") -> PixArtConfig:
        """What a config.json says.

        Args:
            said: Its entries.
            where: The file, for errors.

        Raises:
            AdapterError: It is another model's, an option is unknown, or has a value that is not supported.
        """
        if (name := said.get("_class_name", CLASSES[0])) not in CLASSES:
            raise AdapterError(f"{where}: _class_name is {name!r}, expected {' or '.join(CLASSES)}")
        options = {option: value for option, value in said.items() if not option.startswith("_")}
        for option, value in options.items():
            if option in FIXED and value not in (FIXED[option], None):
                raise AdapterError(f"{where}: {option} {value!r} is not supported; expected {FIXED[option]!r}")
            if option not in {*READ, *FIXED, *IDLE, WIDTH}:
                raise AdapterError(f"{where}: unknown option {option!r}; expected some of {', '.join([*READ, WIDTH])}")
        try:
            CONFIG(options, "")
            config = cls(**{option: value for option, value in options.items() if option in READ})
        except (MismatchError, AdapterError) as error:
            raise AdapterError(f"{where}: {error}") from error
        if (found := options.get(WIDTH, config.width)) != config.width:
            raise AdapterError(
                f"{where}: {WIDTH} is {found!r}, but captions are projected to the {config.width} channels of the"
                " model; expected that number"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """As plain data, under the same names."""
        return asdict(self)
