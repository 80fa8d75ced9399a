"""SD3's text conditioning through DiffusionKit's encoders (two CLIPs and T5), each in memory only while it encodes.

T5-XXL has 4.7 B parameters. Its layers are read one after the other and released at once, so that encoding takes the
memory of one layer and some 10 MB a prompt; what DiffusionKit's ``encode_text`` returns stays the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ...errors import AdapterError, ArtifactError, reason, shortened
from ...files import schema
from ...files.hub import lazy_tensors
from .checkpoint import fill
from .files import Files
from .package import host

CLIP_TOKENS, T5_TOKENS = 77, 512
WIDTH = 4096  # of token embeddings: T5's, and CLIP's after padding
CHUNK = 8  # prompts that go through a layer at once

FILES = (
    *(f"clip_{which}/{name}" for which in "lg" for name in ("config.json", "model.fp16.safetensors")),
    *(f"tokenizer_{which}/{name}" for which in "lg" for name in ("vocab.json", "merges.txt")),
    "t5/t5xxl.safetensors",
)

COUNT, SIZE = schema.whole(1, schema.DEPTH), schema.whole(1, schema.WIDTH)
CLIP_CONFIG = schema.entries(
    {
        "architectures": schema.array_of(schema.text, 1),
        "num_hidden_layers": COUNT,
        "hidden_size": SIZE,
        "num_attention_heads": SIZE,
        "max_position_embeddings": SIZE,
        "vocab_size": SIZE,
    },
    {"projection_dim": SIZE, "hidden_act": schema.one_of("quick_gelu", "gelu")},
)
T5_CONFIG = schema.entries(
    {
        "num_layers": COUNT,
        **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "vocab_size"), SIZE),
        **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), SIZE),
    }
)

log = logging.getLogger("mlxquant")


def _gigabytes() -> tuple[float, float]:
    """In use, and the peak."""
    return mx.get_active_memory() / 1e9, mx.get_peak_memory() / 1e9


class TextEncoders:
    """Encodes prompts; nothing is kept in memory between two calls."""

    def __init__(self, files: Files, dtype: mx.Dtype | None = None):
        """``dtype`` of weights and results: by default float16 on Metal, and float32 on the CPU, where half precision
        is slow.
        """
        self._files = files
        self._dtype = (mx.float32 if mx.default_device() == mx.cpu else mx.float16) if dtype is None else dtype

    def encode(self, prompts: Sequence[str]) -> list[tuple[mx.array, mx.array]]:
        """Token embeddings [77 + 512, 4096] and pooled embedding [P] of each prompt.

        Raises ArtifactError on a missing or damaged file, all of which are looked for first, AdapterError on a prompt
        with characters that CLIP does not know.
        """
        dtype, _ = self._dtype, [self._files.path(name) for name in FILES]
        log.info("text encoders for %d prompts: %.2f GB in use, peak so far %.2f GB", len(prompts), *_gigabytes())
        clips = [self._clip("l", prompts, dtype), self._clip("g", prompts, dtype)]
        last = self._t5(prompts, dtype)
        encoded = []
        for index in range(len(prompts)):
            tokens = mx.concatenate([clip[index][0] for clip in clips], axis=-1)
            if tokens.shape[-1] > WIDTH or last[index].shape[-1] != WIDTH:
                raise ArtifactError(
                    f"{self._files.place}: CLIP and T5 write {tokens.shape[-1]} and {last[index].shape[-1]} channels,"
                    f" SD3 takes {WIDTH}"
                )
            tokens = mx.pad(tokens, [(0, 0), (0, WIDTH - tokens.shape[-1])])
            encoded.append(
                (mx.concatenate([tokens, last[index]]), mx.concatenate([clip[index][1] for clip in clips], axis=-1))
            )
        mx.eval(encoded)
        del clips, last
        mx.clear_cache()
        log.info("text encoders released: %.2f GB in use, peak so far %.2f GB", *_gigabytes())
        return encoded

    def _clip(self, which: str, prompts: Sequence[str], dtype: mx.Dtype) -> list[tuple[mx.array, mx.array]]:
        """Hidden states before the last layer [77, C] and pooled output [P] of one CLIP."""
        kit, files = host(), self._files
        path = files.path(f"clip_{which}/config.json")
        try:
            config = schema.json_value(path.read_text(encoding="utf-8"))
            CLIP_CONFIG(config, "")
            projected = "WithProjection" in config["architectures"][0]
            model = kit.clip.CLIPTextModel(
                kit.config.CLIPTextModelConfig(
                    num_layers=config["num_hidden_layers"],
                    model_dims=config["hidden_size"],
                    num_heads=config["num_attention_heads"],
                    max_length=config["max_position_embeddings"],
                    vocab_size=config["vocab_size"],
                    projection_dim=config["projection_dim"] if projected else None,
                    hidden_act=config.get("hidden_act", "quick_gelu"),
                )
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            again = files.command(f"clip_{which}/config.json")
            raise ArtifactError(
                f"{path}: not the config of a CLIP text encoder ({reason(error)}); get it again with '{again}'"
            ) from error
        weights = files.path(f"clip_{which}/model.fp16.safetensors")
        renamed = dict(
            pair for item in lazy_tensors(weights).items() for pair in kit.model_io.map_clip_text_encoder_weights(*item)
        )
        fill(model, renamed, dtype, str(weights))
        tokenizer = self._clip_tokenizer(which, config["vocab_size"])
        pad = tokenizer.eos_token if tokenizer.pad_with_eos else 0
        ids = [self._padded(tokenizer.tokenize, text, pad, CLIP_TOKENS) for text in prompts]
        outputs = []
        for start in range(0, len(ids), CHUNK):
            found = model(mx.array(ids[start : start + CHUNK]))
            hidden, pooled = found.hidden_states[-2], found.pooled_output
            mx.eval(hidden, pooled)
            outputs += [(hidden[i], pooled[i]) for i in range(len(hidden))]
        return outputs

    def _clip_tokenizer(self, which: str, size: int) -> Any:
        """DiffusionKit's tokenizer, whose ids are below ``size``: MLX does not look whether an embedding has a row."""
        vocabulary, merges = (
            self._files.path(f"tokenizer_{which}/vocab.json"),
            self._files.path(f"tokenizer_{which}/merges.txt"),
        )
        try:
            pairs = [
                tuple(line.split())
                for line in merges.read_text(encoding="utf-8").strip().split("\n")[1 : 49152 - 256 - 2 + 1]
            ]
            vocab = schema.json_value(vocabulary.read_text(encoding="utf-8"))
            schema.table_of(schema.whole(0, size - 1))(vocab, "")
            tokenizer = host().tokenizer.Tokenizer({pair: rank for rank, pair in enumerate(pairs)}, vocab, which == "l")
            _ = tokenizer.bos_token, tokenizer.eos_token
            return tokenizer
        except (ValueError, KeyError, TypeError) as error:
            again = self._files.command(f"tokenizer_{which}/vocab.json tokenizer_{which}/merges.txt")
            raise ArtifactError(
                f"{vocabulary}: not a CLIP tokenizer ({reason(error)}); get it again with '{again}'"
            ) from error

    @staticmethod
    def _padded(tokenize: Callable[[str], list[int]], text: str, pad: int, length: int) -> list[int]:
        try:
            ids = list(tokenize(text))
        except KeyError as error:
            raise AdapterError(
                f"prompt {text!r}: CLIP's tokenizer has no token for {error.args[0]!r}; leave it out"
            ) from error
        return (ids + [pad] * (length - len(ids)))[:length]

    def _t5(self, prompts: Sequence[str], dtype: mx.Dtype) -> list[mx.array]:
        """T5's last hidden state [512, 4096] of each prompt, without a mask over the padding, as DiffusionKit
        has it.
        """
        kit, files = host(), self._files
        weights, place, again = files.path("t5/t5xxl.safetensors"), files.t5, files.command("t5/t5xxl.safetensors")
        try:
            from transformers import AutoTokenizer, T5Config

            config = T5Config.from_pretrained(place)
            T5_CONFIG(config.to_dict(), "")
            tokenizer = AutoTokenizer.from_pretrained(
                place, legacy=False, model_max_length=T5_TOKENS, trust_remote_code=False
            )
            schema.whole(1, config.vocab_size)(len(tokenizer), "the number of its tokenizer's tokens")
            arrays = kit.model_io.t5_encoder_state_dict_adjustments(lazy_tensors(weights), prefix="")
        except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise ArtifactError(
                f"{place}: T5's config or tokenizer cannot be read ({shortened(reason(error), 100)}); get them again"
                f" with '{files.t5_command}'"
            ) from error
        except KeyError as error:
            raise ArtifactError(
                f"{weights}: not T5's encoder, {error} is missing; get it again with '{again}'"
            ) from error
        if any(name.startswith(f"encoder.layers.{config.num_layers}.") for name in arrays):
            raise ArtifactError(
                f"{weights}: more layers than the {config.num_layers} of {place}; get it again with '{again}'"
            )
        model = kit.t5.SD3T5Encoder(config, low_memory_mode=False)
        fill(model, arrays, dtype, str(weights))
        del arrays

        def tokenize(text: str) -> list[int]:
            return list(tokenizer(text, max_length=T5_TOKENS, truncation=True)["input_ids"])

        ids = mx.array([self._padded(tokenize, text, 0, T5_TOKENS) for text in prompts])
        encoder = model.encoder
        bias = encoder.relative_attention_bias(T5_TOKENS, T5_TOKENS)
        hidden = [model.wte(ids[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
        mx.eval(hidden, bias)
        model.wte = None
        while encoder.layers:
            layer = encoder.layers.pop(0)
            for index, states in enumerate(hidden):
                hidden[index] = layer(states, mask=bias)
                mx.eval(hidden[index])
            del layer
            mx.clear_cache()
        last = []
        while hidden:
            last.append(encoder.ln(hidden.pop(0)).astype(dtype))
            mx.eval(last[-1])
        return [states[i] for states in last for i in range(len(states))]
