"""Which Mac holds which model of mflux, to run and to quantize: ``python benchmarks/mflux_sizes.py``.

Arithmetic, nothing is measured: mflux's own pipelines are built at their full sizes without weights, and
``mlxquant quantize --dry-run`` is asked about each. A model counts as running on a Mac where its folder and what a
picture needs beside it fit into what macOS gives the GPU; as quantized there where the peak fits, too. The table is
that of docs/mflux.md; the last line on stdout is one JSON object. Needs mflux: ``pip install --no-deps
mflux==0.24.0``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click

import mlxquant as mq  # noqa: F401  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig

from mlxquant.api.dry_run import plan_pipeline
from mlxquant.api.pipeline_plan import PipelinePlan
from mlxquant.commandline.console import result, say
from mlxquant.models.mflux.names import MfluxName, from_mflux
from mlxquant.models.mflux.outline import unread
from mlxquant.models.mflux.pipeline import MfluxPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.mflux_tokenizers import write_tokenizers

MODELS = {  # as a command takes it, and how many blocks its FLUX.1 has, which mflux reads from weights
    "Z-Image-Turbo": ("mflux:z-image-turbo", {}),
    "FLUX.2 klein 4B": ("mflux:flux2-klein-4b", {}),
    "FLUX.2 klein 9B": ("mflux:flux2-klein-9b", {}),
    "FLUX.1-lite": ("mflux:dev@Freepik/flux.1-lite-8B", {"transformer_blocks": 8, "single_transformer_blocks": 38}),
    "FLUX.1-dev": ("mflux:dev", {"transformer_blocks": 19, "single_transformer_blocks": 38}),
    "Qwen-Image": ("mflux:qwen-image", {}),
}
MACS = (16, 32, 64)  # GB
GIB = 2**30  # a Mac with 16 GB has 16 GiB
PICTURE, SYSTEM = 2e9, 3e9  # bytes that a picture needs beside the weights, and what macOS keeps
PROMPTS, SIZE = 16, (512, 512)


def built(reference: str, blocks: dict[str, int], folder: Path) -> MfluxPipeline:
    """A pipeline of full size whose weights nobody has made, with small tokenizers."""
    name = MfluxName.of(reference)
    config = ModelConfig.from_name(name.place, base_model=name.key) if name.place else ModelConfig.from_name(name.key)
    kind = from_mflux("models.common.cli.save.MODEL_CLASSES")[name.key]
    loader = from_mflux("models.common.weights.loading.weight_loader.WeightLoader")
    tokenizers = from_mflux("models.common.tokenizer.TokenizerLoader")
    load_all = tokenizers.load_all

    def nothing(weight_definition: Any, **options: Any) -> Any:
        parts: dict[str, Any] = {one.name: {} for one in weight_definition.get_components()}
        parts["transformer"] = {key: [{} for _ in range(count)] for key, count in blocks.items()}
        places = "models.common.weights.loading.loaded_weights"
        return from_mflux(f"{places}.LoadedWeights")(components=parts, meta_data=from_mflux(f"{places}.MetaData")())

    def small(definitions: Any, model_path: Any, **options: Any) -> Any:
        write_tokenizers(definitions, folder)
        return load_all(definitions=definitions, model_path=str(folder), **options)

    with (
        unread(),
        mock.patch.object(loader, "load", staticmethod(nothing)),
        mock.patch.object(tokenizers, "load_all", staticmethod(small)),
    ):
        made = kind(quantize=None, model_config=config, model_path=name.place or None)
    pipeline = MfluxPipeline(made, name)
    for component in pipeline.components:
        component.module.set_dtype(mx.float32)  # in which mflux draws on a CPU
    return pipeline


def in_16_bits(plan: PipelinePlan) -> PipelinePlan:
    """The plan of a machine that holds weights as they come."""
    return replace(plan, components=tuple(replace(one, loaded=one.before) for one in plan.components))


def for_gpu(gigabytes: int) -> float:
    """Bytes that macOS lets the GPU of a Mac have."""
    return gigabytes * GIB * (2 / 3 if gigabytes <= 36 else 3 / 4)


def smallest(fits: Any) -> str:
    """The smallest Mac of which ``fits`` is true."""
    return next((f"{size} GB" for size in MACS if fits(size)), "none of them")


@click.command(help=__doc__)
@click.option("--recipe", default="gptq-w4a16-g64", show_default=True)
@click.option("--only", type=click.Choice(list(MODELS)), help="One model.")
def main(recipe: str, only: str | None) -> None:
    rows: dict[str, Any] = {}
    say(f"| model | parameters | GB at 16 bits | runs on | GB at `{recipe}` | runs on | peak GB | is quantized on |")
    say("|---|---|---|---|---|---|---|---|")
    for title, (reference, blocks) in MODELS.items():
        if only not in (None, title):
            continue
        with tempfile.TemporaryDirectory() as folder:
            pipeline = built(reference, blocks, Path(folder))
            plan = in_16_bits(plan_pipeline(pipeline, PROMPTS, recipe, size=SIZE, measure=False))
        before, after = (sum(getattr(one, name) for one in plan.components) for name in ("before", "after"))
        holds = {
            "dense": smallest(lambda size: before + PICTURE <= for_gpu(size)),  # noqa: B023
            "quantized": smallest(lambda size: after + PICTURE <= for_gpu(size)),  # noqa: B023
            "quantizing": smallest(lambda size: plan.loaded <= for_gpu(size) and plan.peak <= size * GIB - SYSTEM),  # noqa: B023
        }
        weights = sum(one.weights for one in plan.components)
        rows[title] = {"parameters": weights, "before": before, "after": after, "peak": plan.peak, **holds}
        rows[title] |= {"plan": plan.facts}
        say(
            f"| {title} | {weights / 1e9:.1f} B | {before / 1e9:.1f} | {holds['dense']} | {after / 1e9:.1f} |"
            f" {holds['quantized']} | {plan.peak / 1e9:.1f} | {holds['quantizing']} |"
        )
    result({"recipe": recipe, "models": rows, "mlx_peak_bytes": mx.get_peak_memory()})


if __name__ == "__main__":
    main()
