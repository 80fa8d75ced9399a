"""The ``mlxquant`` command: one verb a module, imported when it is used.

The help has its lines here, so that it imports no verb: MLX, NumPy and the models behind the verbs take ten times as
long. ``tests/commandline`` holds each line to what the verb says of itself.
"""

from __future__ import annotations

from importlib import import_module

import click

from .usage import short_usage_errors

GROUPS = {  # in the order of the help; what matters first comes first
    "Make and use a model": {
        "demo": "Quantize the embedded model and compare.",
        "quantize": "Quantize a model with calibration and write it.",
        "generate": "Draw one picture as a PNG.",
        "evaluate": "Judge quantized models against a reference.",
        "export": "Write a model for another tool.",
        "calibrate-snr": "Quantize with activation scales by log-SNR.",
        "quantize-qronos": "Quantize by Qronos.",
        "quantize-qronos-4blocks": "Quantize four blocks by Qronos.",
    },
    "The pipeline step by step": {
        "generate-calibration-data": "Keep the latents of real trajectories.",
        "cache-adaround-data": "Cache what every block writes.",
        "adaround-optimize": "Learn how every block's weights are rounded.",
        "collect-layer-activations": "Collect activation statistics.",
        "analyze-activations": "Decide how inputs are quantized at each timestep.",
        "load-adaround-model": "Draw with what the other steps have made.",
    },
    "Look inside and compare": {
        "inspect": "Show what is in a model, a checkpoint or a file.",
        "methods": "List every method with its paper.",
        "visualize": "Draw weights, codes and activations.",
        "perplexity": "Measure how well language models predict a text.",
        "compare-images": "Compare folders of pictures with a reference.",
        "evaluate-compare": "Compare log-SNR scales with others.",
        "benchmark-final": "Compare quantized models with their baseline.",
    },
    "Train": {
        "train-gpt": "Train a small GPT, also through fake quantizers.",
        "save-weights": "Write the integers behind a GPT's weights.",
    },
}
VERBS = {verb: line for group in GROUPS.values() for verb, line in group.items()}
MODULES = {"methods": "list_methods"}  # where the verb's own name is taken


class Verbs(click.Group):
    """The verbs by group, each with its line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with short_usage_errors():
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        with short_usage_errors():
            return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = MODULES.get(cmd_name, cmd_name.replace("-", "_"))
        command: click.Command = import_module(f"mlxquant.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))  # one column for all groups
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(width), line) for verb, line in verbs.items()])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlxquant")
def main() -> None:
    """Make diffusion transformers small enough for the Mac they run on, without the picture changing; and language
    models.
    """
