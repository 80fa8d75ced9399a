"""Small UNets, as the ``unet/config.json`` of a folder has them."""

SD15 = {  # as Stable Diffusion 1.5: convolutions around transformers, as many heads everywhere
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SD21 = {  # as 2.1: Linears around transformers, more heads where there are more channels
    **SD15,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
MIXED = {  # blocks without attention in the middle, two transformer blocks a transformer, blocks of other depths
    **SD21,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [2, 1, 1],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CONFIGS = {"1.5": SD15, "2.1": SD21, "mixed": MIXED}
