"""Write random SD3-Medium or SD3.5-Medium checkpoints, at their real size or tiny, in the single files that are
published, and for SD3-Medium all that DiffusionKit 0.5.1 downloads.

    python benchmarks/random_sd3.py --size sd3-medium --folder FOLDER --no-text

Names, layouts and dtype (float16) are those of the published files, as DiffusionKit's loaders find them before their
own adjustments. The weights are noise that behaves like a trained model: every layer, output channel and input channel
has its own scale, some input channels are outliers, gates are small, and hidden states stay of about unit scale from
the first block to the last. Pictures are noise too. A seed gives the same bytes; a tensor is drawn, written and
forgotten. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

import mlxquant  # noqa: F401  # before mlx

# isort: split
from mlxquant.commandline.console import result, say
from random_tensors import Tensor, convolution, linear, norm, write_tensors
from random_text_encoders import (
    TOKEN,
    ClipSizes,
    T5Sizes,
    clip,
    t5,
    write_clip_config,
    write_clip_tokenizer,
    write_json,
    write_t5_config,
)

LATENT, PATCH, FREQUENCIES = 16, 2, 256
MMDIT, TEXT, T5_CONFIG = "argmaxinc/mlx-stable-diffusion-3-medium", "argmaxinc/stable-diffusion", "google/t5-v1_1-xxl"


@dataclass(frozen=True)
class Sizes:
    """``table`` is the side of the position table, which is also the largest side of a latent that DiffusionKit
    accepts; ``vae`` the channels of the VAE's four levels, multiples of its 32 groups. SD3.5 has ``norms`` of queries
    and keys, and a second attention in the first ``dual`` blocks.
    """

    hidden: int
    depth: int
    table: int
    vae: tuple[int, int, int, int]
    clip_l: ClipSizes
    clip_g: ClipSizes
    t5: T5Sizes
    dual: int = 0
    norms: bool = False

    @property
    def file(self) -> str:
        """What the single file is called."""
        return "sd3.5_medium.safetensors" if self.norms else "sd3_medium.safetensors"

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @property
    def pooled(self) -> int:
        return self.clip_l.hidden + self.clip_g.hidden


SD3_MEDIUM = Sizes(
    1536, 24, 192, (128, 256, 512, 512), ClipSizes(768, 12, 12, "quick_gelu", 49408), ClipSizes(1280, 32, 20, "gelu",
    49408),
    T5Sizes(24, 64, 64, 10240, 32128),
)  # fmt: skip
TINY = Sizes(
    128,
    2,
    32,
    (32, 32, 64, 64),
    ClipSizes(48, 2, 2, "quick_gelu", 600),
    ClipSizes(80, 2, 2, "gelu", 600),
    T5Sizes(1, 2, 16, 32, 512),
)
SD35_MEDIUM, TINY_35 = replace(SD3_MEDIUM, table=384, dual=13, norms=True), replace(TINY, table=48, dual=1, norms=True)
SIZES = {"sd3-medium": SD3_MEDIUM, "sd3.5-medium": SD35_MEDIUM, "tiny": TINY, "tiny-3.5": TINY_35}


def mmdit(sizes: Sizes) -> Iterator[Tensor]:
    """The transformer. Rows of adaLN are shift, scale, gate (twice); gates are small, so that 24 blocks add up to a few
    units.
    """
    d, prefix = sizes.hidden, "model.diffusion_model."
    yield from convolution(f"{prefix}x_embedder.proj", d, LATENT, PATCH)
    yield Tensor(f"{prefix}pos_embed", (1, sizes.table**2, d), 0.5)
    for name, columns, gain in (("t", FREQUENCIES, 1.5), ("y", sizes.pooled, 0.3)):
        yield from linear(f"{prefix}{name}_embedder.mlp.0", d, columns)
        yield from linear(f"{prefix}{name}_embedder.mlp.2", d, d, gain)
    yield from linear(f"{prefix}context_embedder", d, TOKEN)
    for index in range(sizes.depth):
        for stream in ("x_block", "context_block"):
            name = f"{prefix}joint_blocks.{index}.{stream}"
            keys_only = stream == "context_block" and index == sizes.depth - 1
            dual = stream == "x_block" and index < sizes.dual
            parts = (1.0, 1.0) if keys_only else (1.0, 1.0, 0.6) * (3 if dual else 2)
            yield from linear(f"{name}.adaLN_modulation.1", len(parts) * d, d, 0.3, parts, bias=0.2)
            for attention in ("attn", "attn2") if dual else ("attn",):
                yield from linear(f"{name}.{attention}.qkv", 3 * d, d, parts=(1.4, 1.4, 1.0))
                if sizes.norms:
                    yield from (Tensor(f"{name}.{attention}.ln_{part}.weight", (64,), 0.1, mean=1.0) for part in "qk")
                if not keys_only:
                    yield from linear(f"{name}.{attention}.proj", d, d)
            if not keys_only:
                yield from linear(f"{name}.mlp.fc1", 4 * d, d)
                yield from linear(f"{name}.mlp.fc2", d, 4 * d)
    yield from linear(f"{prefix}final_layer.adaLN_modulation.1", 2 * d, d, 0.3)
    yield from linear(f"{prefix}final_layer.linear", PATCH**2 * LATENT, d, 0.8)


def residual(name: str, before: int, after: int) -> Iterator[Tensor]:
    """A ResNet block of the VAE."""
    yield from norm(f"{name}.norm1", before)
    yield from convolution(f"{name}.conv1", after, before, 3)
    yield from norm(f"{name}.norm2", after)
    yield from convolution(f"{name}.conv2", after, after, 3, 0.8)
    if before != after:
        yield from convolution(f"{name}.nin_shortcut", after, before, 1)


def vae_half(
    half: str, direction: str, levels: Sequence[tuple[int, int]], blocks: int, before: int, after: int, deepest: int
) -> Iterator[Tensor]:
    """Encoder or decoder of the VAE, from ``before`` to ``after`` channels through ``levels`` (number, channels) in
    running order.
    """
    name, channels = f"first_stage_model.{half}", levels[0][1]
    yield from convolution(f"{name}.conv_in", channels, before, 3)
    for level, wanted in levels:
        for index in range(blocks):
            yield from residual(f"{name}.{direction}.{level}.block.{index}", channels, wanted)
            channels = wanted
        if level != levels[-1][0]:
            yield from convolution(f"{name}.{direction}.{level}.{direction}sample.conv", channels, channels, 3)
    for block in ("block_1", "block_2"):
        yield from residual(f"{name}.mid.{block}", deepest, deepest)
    yield from norm(f"{name}.mid.attn_1.norm", deepest)
    for layer in ("q", "k", "v", "proj_out"):
        yield from convolution(f"{name}.mid.attn_1.{layer}", deepest, deepest, 1, 0.8)
    yield from norm(f"{name}.norm_out", channels)
    yield from convolution(f"{name}.conv_out", after, channels, 3)


def vae(sizes: Sizes) -> Iterator[Tensor]:
    """Both halves of the VAE; level 0 is the largest picture. The encoder writes means and log-variances."""
    levels = list(enumerate(sizes.vae))
    yield from vae_half("encoder", "down", levels, 2, 3, 2 * LATENT, sizes.vae[-1])
    yield from vae_half("decoder", "up", levels[::-1], 3, LATENT, 3, sizes.vae[-1])


def write_checkpoint(folder: Path, sizes: Sizes, seed: int) -> None:
    """Transformer and VAE in one file, as Stability published them."""
    write_tensors(folder / sizes.file, [*mmdit(sizes), *vae(sizes)], seed)


def write_encoders(folder: Path, sizes: Sizes, seed: int) -> None:
    """The three text encoders, and the tokenizers of two."""
    for letter, encoder, own in (("l", sizes.clip_l, seed), ("g", sizes.clip_g, seed + 1)):
        write_clip_config(folder / f"clip_{letter}" / "config.json", encoder)
        write_tensors(folder / f"clip_{letter}" / "model.fp16.safetensors", clip(encoder), own)
        write_clip_tokenizer(folder / f"tokenizer_{letter}", encoder.vocabulary)
    write_tensors(folder / "t5" / "t5xxl.safetensors", t5(sizes.t5), seed)


def snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository's only commit in a Hugging Face cache."""
    folder, commit = cache / f"models--{repository.replace('/', '--')}", hashlib.sha1(repository.encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def write_hub_cache(cache: Path, sizes: Sizes = TINY, seed: int = 0) -> Path:
    """Everything that DiffusionKit downloads, where it finds it without a network when HF_HUB_CACHE names this
    folder.
    """
    write_json(snapshot(cache, MMDIT) / "config.json", asdict(sizes))
    write_checkpoint(snapshot(cache, MMDIT), sizes, seed)
    write_encoders(snapshot(cache, TEXT), sizes, seed)
    write_t5_config(snapshot(cache, T5_CONFIG), sizes.t5)
    return cache


def write_folder(folder: Path, sizes: Sizes = TINY, seed: int = 0, text: bool = True) -> Path:
    """The same files in one folder, T5's config and tokenizer beside its weights; without ``text`` transformer and VAE
    alone.
    """
    write_checkpoint(folder, sizes, seed)
    if text:
        write_encoders(folder, sizes, seed)
        write_t5_config(folder / "t5", sizes.t5)
    return folder


def parameters(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


@click.command()
@click.option("--size", "name", type=click.Choice(list(SIZES)), default="tiny", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Write one folder.")
@click.option("--hub-cache", type=click.Path(path_type=Path), help="Write a Hugging Face cache, for HF_HUB_CACHE.")
@click.option(
    "--text/--no-text", default=True, show_default=True, help="Text encoders too: 11 GB more at the real size."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(name: str, folder: Path | None, hub_cache: Path | None, text: bool, seed: int) -> None:
    """Write a random checkpoint."""
    sizes, start = SIZES[name], time.perf_counter()
    if folder is not None and hub_cache is None:
        written = write_folder(folder, sizes, seed, text)
    elif hub_cache is not None and folder is None and text and not sizes.norms:
        written = write_hub_cache(hub_cache, sizes, seed)
    else:
        raise click.UsageError("pass either --folder or --hub-cache, and --no-text or an SD3.5 with --folder only")
    seconds, size = (
        time.perf_counter() - start,
        sum(path.stat().st_size for path in written.rglob("*") if path.is_file()),
    )
    weights = parameters(mmdit(sizes))
    say(f"{written}: {size / 1e9:.3f} GB in {seconds:.1f} s, transformer of {weights / 1e9:.3f} B parameters")
    result({"path": str(written), "bytes": size, "seconds": seconds, "parameters": weights, "seed": seed})


if __name__ == "__main__":
    main()
