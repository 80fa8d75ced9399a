"""The ``mlxquant`` command: one verb a module, imported when it is used."""

from __future__ import annotations

from importlib import import_module

import click

VERBS = (
    "adaround-optimize",
    "analyze-activations",
    "benchmark-final",
    "cache-adaround-data",
    "calibrate-snr",
    "collect-layer-activations",
    "compare-images",
    "demo",
    "evaluate",
    "export",
    "generate",
    "generate-calibration-data",
    "inspect",
    "load-adaround-model",
    "methods",
    "perplexity",
    "quantize",
    "quantize-qronos",
    "save-weights",
    "train-gpt",
    "visualize",
)
MODULES = {"methods": "list_methods"}  # where the verb's own name is taken


class Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = MODULES.get(cmd_name, cmd_name.replace("-", "_"))
        command: click.Command = import_module(f"mlxquant.{module}").command
        return command


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlxquant")
def main() -> None:
    """Make diffusion transformers small enough for the Mac they run on, without the picture changing; and language
    models.
    """
