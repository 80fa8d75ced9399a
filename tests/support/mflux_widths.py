"""The numbers that make models of mflux small, family by family.

All widths that are quantized are multiples of 64, the groups of mflux, so that its own ``-q`` works on them too.
Heads have 64 channels where mflux has 128, and rotary axes share them; T5 keeps its 64 heads, of two channels each.
Texts are padded to 128 tokens where mflux pads to 256 or 512: a token is a letter here, and padding would take most of
the time.

What is patched besides widths and depths: the arrays that mflux makes bfloat16 whatever its precision (the text
embeddings of Qwen-Image and FLUX.3) are float32, and the layers of text encoders that are read are ones that exist.
"""

MODELS = "mflux.models"
VOCABULARY = "514"  # of tests/support/mflux_tokenizers.py
TEXT = "128"

_AUTOENCODER = {"128": "32", "256": "32", "512": "64"}
_HEADS = {"3072": "128", "128": "64", "24": "2"}

FLUX1 = {
    f"{MODELS}.flux.model.flux_transformer": {
        "3072": "128", "12288": "512", "18432": "768", "4096": "128", "768": "64",
    },
    f"{MODELS}.flux.model.flux_transformer.joint_attention": _HEADS,
    f"{MODELS}.flux.model.flux_transformer.single_block_attention": _HEADS,
    f"{MODELS}.flux.model.flux_transformer.embed_nd": {"56": "24"},
    f"{MODELS}.flux.model.flux_text_encoder.t5_encoder": {"4096": "128", "10240": "256"},
    f"{MODELS}.flux.model.flux_text_encoder.t5_encoder.t5_encoder": {
        "4096": "128", "32128": VOCABULARY, "range(24)": "range(2)",
    },
    f"{MODELS}.flux.model.flux_text_encoder.t5_encoder.t5_self_attention": {
        "4096": "128", "(1, -1, 64, 64)": "(1, -1, 64, 2)",
    },
    f"{MODELS}.flux.model.flux_text_encoder.clip_encoder": {
        "768": "64", "3072": "128", "49408": VOCABULARY, "num_heads = 12": "num_heads = 1",
        "num_encoder_layers=12": "num_encoder_layers=2",
    },
    f"{MODELS}.flux.model.flux_vae": _AUTOENCODER,
    f"{MODELS}.flux.weights.flux_weight_definition": {"num_blocks=24": "num_blocks=2"},
}  # fmt: skip

Z_IMAGE = {
    f"{MODELS}.z_image.model.z_image_transformer.transformer": {
        "dim: int = 3840": "dim: int = 192", "n_layers: int = 30": "n_layers: int = 2",
        "n_refiner_layers: int = 2": "n_refiner_layers: int = 1", "n_heads: int = 30": "n_heads: int = 3",
        "2560": "128", "[32, 48, 48]": "[16, 24, 24]", "mid_size=1024": "mid_size=256",
    },
    f"{MODELS}.z_image.model.z_image_text_encoder.text_encoder": {
        "151936": VOCABULARY, "2560": "128", "36": "3", "num_attention_heads: int = 32": "num_attention_heads: int = 2",
        "num_key_value_heads: int = 8": "num_key_value_heads: int = 1", "9728": "256", "128": "64",
    },
    f"{MODELS}.z_image.model.z_image_vae": _AUTOENCODER,
    f"{MODELS}.z_image.weights.z_image_weight_definition": {"30": "2", "36": "3", "512,": f"{TEXT},"},
}  # fmt: skip

FLUX2 = {
    f"{MODELS}.flux2.model.flux2_vae": {"(128, 256, 512, 512)": "(32, 32, 64, 64)"},
    f"{MODELS}.flux2.variants.txt2img.flux2_klein": {"(9, 18, 27)": "(1, 2, 3)", "512": TEXT},
}

FLUX3 = {
    f"{MODELS}.flux3.model.flux3_text_encoder.prompt_encoder": {
        "(4, 8, 12, 16, 20, 24, 28, 32)": "(1, 2)", "mx.bfloat16": "mx.float32",
    },
    f"{MODELS}.flux3.weights.flux3_weight_definition": {"32": "2"},
}  # fmt: skip

QWEN_IMAGE = {
    f"{MODELS}.qwen.model.qwen_transformer.qwen_transformer": {
        "60": "2", "128": "64", "24": "2", "3584": "128", "[16, 56, 56]": "[16, 24, 24]",
    },
    f"{MODELS}.qwen.model.qwen_text_encoder.qwen_encoder": {
        "152064": VOCABULARY, "3584": "128", "num_hidden_layers: int = 28": "num_hidden_layers: int = 2",
        "hidden_size // 28": "hidden_size // 1",
    },
    f"{MODELS}.qwen.model.qwen_text_encoder.qwen_encoder_layer": {
        "3584": "128", "28": "1", "num_key_value_heads: int = 4": "num_key_value_heads: int = 1", "18944": "256",
    },
    f"{MODELS}.qwen.model.qwen_text_encoder.qwen_text_encoder": {"mx.bfloat16": "mx.float32"},
    f"{MODELS}.qwen.model.qwen_vae": {"384": "64", "192": "32", "96": "16"},
    f"{MODELS}.qwen.weights.qwen_weight_definition": {"mx.bfloat16": "mx.float32"},
}  # fmt: skip

ERNIE_IMAGE = {
    f"{MODELS}.ernie_image.model.ernie_transformer.transformer": {
        "4096": "128", "32": "2", "36": "2", "12288": "256", "3072": "128", "[32, 48, 48]": "[16, 24, 24]",
    },
    f"{MODELS}.ernie_image.model.ernie_text_encoder.text_encoder": {
        "131072": VOCABULARY, "3072": "128", "26": "3", "num_attention_heads: int = 32": "num_attention_heads: int = 2",
        "num_key_value_heads: int = 8": "num_key_value_heads: int = 1", "128": "64", "9216": "256",
    },
    f"{MODELS}.ernie_image.model.ernie_text_encoder.prompt_encoder": {"3072": "128"},
    f"{MODELS}.ernie_image.weights.ernie_weight_definition": {"36": "2"},
}  # fmt: skip

KREA2 = {
    f"{MODELS}.krea2.model.krea2_transformer.transformer": {
        "6144": "128", "2560": "128", "48": "2", "kvheads: int = 12": "kvheads: int = 1", "28": "2",
        "txtlayers: int = 12": "txtlayers: int = 2", "20": "2",
    },
    f"{MODELS}.krea2.model.krea2_text_encoder.text_encoder": {
        "(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)": "(1, 2)", "151644": "257", "151936": VOCABULARY,
        "2560": "128", "36": "2", "num_attention_heads: int = 32": "num_attention_heads: int = 2",
        "num_key_value_heads: int = 8": "num_key_value_heads: int = 1", "9728": "256", "128": "64",
    },
    f"{MODELS}.krea2.weights.krea2_weight_definition": {"28": "2", "mx.bfloat16": "mx.float32"},
}  # fmt: skip

BOOGU = {
    f"{MODELS}.boogu.model.boogu_transformer.boogu_transformer": {
        "3360": "128", "num_layers: int = 40": "num_layers: int = 4",
        "num_double_stream_layers: int = 8": "num_double_stream_layers: int = 2",
        "num_refiner_layers: int = 2": "num_refiner_layers: int = 1", "28": "2", "num_kv_heads: int = 7":
        "num_kv_heads: int = 1", "(40, 40, 40)": "(16, 24, 24)", "4096": "128",
    },
    f"{MODELS}.boogu.model.boogu_text_encoder": {
        "151936": VOCABULARY, "4096": "128", "36": "2", "num_attention_heads=32": "num_attention_heads=2",
        "num_key_value_heads=8": "num_key_value_heads=1", "12288": "256", "128": "64",
    },
}  # fmt: skip

MOSS_IMAGE = {
    f"{MODELS}.moss_image.moss_image_initializer": {"(96, 192, 384, 384)": "(32, 32, 64, 64)"},
    f"{MODELS}.moss_image.variants.txt2img.moss_image": {"22": "1"},
    f"{MODELS}.moss_image.weights.moss_image_weight_mapping": {
        "NUM_TRANSFORMER_LAYERS = 42": "NUM_TRANSFORMER_LAYERS = 2",
        'QWEN3_5_9B_TEXT_CONFIG["num_hidden_layers"]': "4", 'QWEN3_5_9B_TEXT_CONFIG["full_attention_interval"]': "2",
    },
}  # fmt: skip

FIBO = {
    f"{MODELS}.fibo.model.fibo_transformer": {
        "3072": "128", "4096": "256", "2048": "128", "1536": "64", "24": "2", "128": "64", "[16, 56, 56]":
        "[16, 24, 24]", "num_layers: int = 8": "num_layers: int = 1", "num_single_layers: int = 38":
        "num_single_layers: int = 1",
    },
    f"{MODELS}.fibo.model.fibo_text_encoder.smol_lm3_3b_text_encoder": {
        "128_256": VOCABULARY, "2048": "128", "11_008": "256", "36": "2", "16": "2", "num_key_value_heads: int = 4":
        "num_key_value_heads: int = 1",
    },
    f"{MODELS}.fibo.model.fibo_text_encoder.prompt_encoder": {"46": "2"},
    f"{MODELS}.fibo.model.fibo_vae.wan_2_2_vae": {"160": "16", "256": "16"},
    f"{MODELS}.fibo.weights.fibo_weight_definition": {"num_blocks=38": "num_blocks=1", "46": "2", "36": "2"},
}  # fmt: skip

FIBO2 = {
    f"{MODELS}.fibo2.model.fibo2_transformer.fibo2_transformer": {"mid_size=1024": "mid_size=256"},
    f"{MODELS}.fibo2.model.fibo2_transformer.fibo2_perceiver": {
        "min_gist: int = 256": "min_gist: int = 16", "gist_step: int = 64": "gist_step: int = 16",
    },
    f"{MODELS}.fibo2.model.fibo2_text_encoder.fibo2_text_encoder": {
        "35": "3", "151936": VOCABULARY, "2560": "128", "32": "2", "8": "1", "128": "64", "9728": "256",
        "[24, 20, 20]": "[12, 10, 10]", "24": "2", "1024": "64", "4096": "128", "16,": "1,", "[5, 11, 17]": "[0, 1]",
    },
    f"{MODELS}.fibo2.model.fibo2_text_encoder.prompt_encoder": {
        "((9, 20, 31), (5, 16, 27), (7, 18, 29), (9, 20, 31), (11, 22, 33), (13, 24, 35))": "((1, 2, 3), (1, 2, 3))",
    },
    f"{MODELS}.fibo2.weights.fibo2_weight_mapping": {"44": "2", "NUM_REFINER_LAYERS = 2": "NUM_REFINER_LAYERS = 1"},
}  # fmt: skip

ANIMA = {
    f"{MODELS}.flux2.model.flux2_text_encoder.qwen3_text_encoder": {"151936": VOCABULARY},
    f"{MODELS}.anima.anima_initializer": {"1024": "128", "28": "2", "16": "2", "8,": "1,", "3072": "256", "128": "64"},
    f"{MODELS}.anima.model.anima_text_encoder.anima_prompt_encoder": {"151643": "256"},
    f"{MODELS}.anima.model.anima_transformer.anima_transformer": {
        "2048": "128", "28": "2", "num_heads: int = 16": "num_heads: int = 2", "1024": "128",
        "adaln_lora_dim: int = 256": "adaln_lora_dim: int = 64", "512": TEXT,
    },
    f"{MODELS}.anima.model.anima_transformer.anima_llm_adapter": {
        "32128": VOCABULARY, "1024": "128", "6": "1", "16": "2",
    },
    f"{MODELS}.anima.weights.anima_weight_mapping": {"28": "2", "6": "1"},
}  # fmt: skip

IRIS = {
    f"{MODELS}.iris.model.iris_transformer.iris_transformer": {
        "2560": "128", "24": "2", "dual_depth: int = 8": "dual_depth: int = 1", "20": "2",
        "num_kv_heads: int = 5": "num_kv_heads: int = 1", "300": "64", "12": "2", "32": "2",
        "pixel_depth: int = 4": "pixel_depth: int = 1", "pixel_hidden_size: int = 16": "pixel_hidden_size: int = 4",
        "1280": "128", "10": "2",
    },
    f"{MODELS}.iris.model.iris_transformer.iris_text_embedder": {"1.3": "1.5"},
    f"{MODELS}.iris.model.iris_text_encoder.prompt_encoder": {
        "300": "64", "(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)": "(1, 2)",
    },
}  # fmt: skip

IDEOGRAM = {
    f"{MODELS}.ideogram4.ideogram4_initializer": {
        "18": "2", "256": "64", "34": "2", "12288": "256", "512": "64", "53248": "3 * 128", "(24, 20, 20)":
        "(12, 10, 10)", "151936": VOCABULARY, "4096": "128", "36": "3",
        '"num_attention_heads", 32': '"num_attention_heads", 2', '"num_key_value_heads", 8': '"num_key_value_heads", 1',
        '"head_dim", 128': '"head_dim", 64',
    },
    f"{MODELS}.ideogram4.model.ideogram4_text_encoder.text_encoder": {
        "(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)": "(0, 1, 2)",
    },
    f"{MODELS}.ideogram4.model.ideogram4_transformer.fp8_linear": {"1_000_000": "0"},
    f"{MODELS}.ideogram4.latent_creator.ideogram4_latent_creator": {"MIN_DIMENSION = 256": "MIN_DIMENSION = 64"},
}  # fmt: skip

MING_IMAGE = {
    f"{MODELS}.ming_image.model.ming_text_encoder.ling_moe_encoder": {
        "HIDDEN_SIZE = 2048": "HIDDEN_SIZE = 128", "NUM_LAYERS = 20": "NUM_LAYERS = 2", "NUM_HEADS = 16":
        "NUM_HEADS = 2", "NUM_KV_HEADS = 4": "NUM_KV_HEADS = 1", "HEAD_DIM = 128": "HEAD_DIM = 64", "ROPE_DIM = 64":
        "ROPE_DIM = 32", "24": "12", "157184": VOCABULARY, "5120": "256", "NUM_EXPERTS = 256": "NUM_EXPERTS = 8",
        "TOP_K = 8": "TOP_K = 2", "N_GROUP = 8": "N_GROUP = 4", "TOPK_GROUP = 4": "TOPK_GROUP = 2", "512": "64",
    },
    f"{MODELS}.ming_image.model.ming_text_encoder.ming_connector": {
        "1536": "128", "28": "1", "12": "2", "NUM_KV_HEADS = 2": "NUM_KV_HEADS = 1", "128": "64", "8960": "256",
    },
    f"{MODELS}.ming_image.model.ming_text_encoder.ming_condition_encoder": {
        "157158": "510", "157157": "511", "157159": "512", "QUERY_GRID = 16": "QUERY_GRID = 4", "(5, 12, 20)":
        "(0, 1, 2)", "2560": "128", "3840": "192",
    },
    f"{MODELS}.ming_image.model.ming_transformer.ming_transformer": {
        "3840": "192", "n_layers: int = 30": "n_layers: int = 2", "n_refiner_layers: int = 2":
        "n_refiner_layers: int = 1", "n_heads: int = 30": "n_heads: int = 3", "2560": "128", "(32, 48, 48)":
        "(16, 24, 24)", "mid_size=1024": "mid_size=256",
    },
    f"{MODELS}.ming_image.model.ming_vae.ming_vae": {"96": "16"},
    f"{MODELS}.ming_image.weights.ming_image_weight_definition": {"30": "2"},
}  # fmt: skip

EDITS = {
    **FLUX1,
    **Z_IMAGE,
    **FLUX2,
    **FLUX3,
    **QWEN_IMAGE,
    **ERNIE_IMAGE,
    **KREA2,
    **BOOGU,
    **MOSS_IMAGE,
    **FIBO,
    **FIBO2,
    **ANIMA,
    **IRIS,
    **IDEOGRAM,
    **MING_IMAGE,
}
"""What is written where in all of them together (``rewritten``)."""


def _qwen3(layers):
    return {
        "vocab_size": int(VOCABULARY), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    }  # fmt: skip


_FLUX2 = {
    "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64,
    "joint_attention_dim": 3 * 128, "axes_dims_rope": (16, 16, 16, 16),
}  # fmt: skip
_FLUX3 = {**_FLUX2, "joint_attention_dim": 2 * 128}

_MOSS_IMAGE = {
    "transformer_overrides": {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 128},
    "text_encoder_overrides": {
        **_qwen3(4), "full_attention_interval": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
}  # fmt: skip
_FIBO2 = {
    "dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 3 * 128,
    "injection_layer_ids": (1,), "perceiver_num_layers": 1, "max_num_gist_tokens": 32, "axes_dims": (16, 24, 24),
}  # fmt: skip
_IRIS = {"text_encoder_overrides": _qwen3(2)}
_TEXT = {"max_sequence_length": int(TEXT)}

CONFIGURATIONS = {
    **dict.fromkeys(("dev", "schnell", "krea-dev"), _TEXT),
    **{
        f"flux2-klein-{size}": {"transformer_overrides": _FLUX2, "text_encoder_overrides": _qwen3(4)}
        for size in ("4b", "9b", "9b-kv", "base-4b", "base-9b")
    },
    "flux3-image-klein": {"transformer_overrides": _FLUX3, "text_encoder_overrides": _qwen3(2)},
    "flux3-image-klein-base": {
        "transformer_overrides": {**_FLUX3, "flow_map": False}, "text_encoder_overrides": _qwen3(2),
    },
    "fibo2": {"transformer_overrides": _FIBO2},
    **dict.fromkeys(("iris-3b", "iris-3b-base"), _IRIS),
    **dict.fromkeys(("moss-image-sft", "moss-image-base"), _MOSS_IMAGE),
    **{f"ernie-image{kind}": {"transformer_overrides": {"rope_axes_dim": [16, 24, 24]}} for kind in ("", "-turbo")},
}  # fmt: skip
"""What stands elsewhere in mflux's own table of models (``ModelConfig``)."""

FILES = {
    "ideogram-4-fp8": {"text_encoder/config.json": {"ideogram_fp8_weight_only": True}},
    "qwen-image-2.1": {
        "vae/config.json": {
            "base_dim": 16, "decoder_base_dim": 16, "dim_mult": [1, 2, 4, 4, 4], "is_residual": True,
            "patch_size": None,
        },
        "transformer/config.json": {
            "in_channels": 64, "out_channels": 64, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
            "context_in_dim": 128, "mlp_ratio": 3, "axes_dims_rope": [16, 24, 24],
        },
        "text_encoder/config.json": {
            "image_token_id": 513,
            "text_config": {
                **_qwen3(2), "max_position_embeddings": 4096, "rope_theta": 5e6, "rms_norm_eps": 1e-6,
                "attention_bias": False, "rope_scaling": {"mrope_section": [12, 10, 10]},
            },
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 1, "out_hidden_size": 128,
                "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
        },
    },
}  # fmt: skip
"""Files of a checkpoint that say how wide it is, or what it is."""
