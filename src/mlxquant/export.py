"""``mlxquant export``: a quantized model in the files of another tool, codes bit for bit, or one clear refusal; or its
folder as one smaller file, and back.
"""

from __future__ import annotations

from pathlib import Path

import click

from .api.loading import load
from .api.pipeline_files import is_pipeline, load_pipeline
from .commandline.console import Command, during_command, progress, result, say
from .commandline.options import MODEL_HELP, PATH, force_option, model_option, option, refuse, verbose_option
from .contents.tables import size
from .exporters.plain import FLOATS
from .exporters.targets import ARCHIVE, PATHS, TARGETS, export
from .files.atomic import claimed


@click.command("export", cls=Command)
@model_option("name", required=True, help=f"A folder that 'mlxquant quantize' wrote. Or unquantized: {MODEL_HELP}")
@option("--target", type=click.Choice(TARGETS), required=True, help="The tool that is to read it.")
@option("--out", type=PATH, required=True, help="Folder for the files; the file of an archive.")
@option("--drop-activations", is_flag=True, help="Leave activation scales out where the target has no place for them.")
@option(
    "--dtype", type=click.Choice(list(FLOATS)), help="Of every floating tensor, scales included.  [default: its own]"
)
@force_option
@verbose_option
def command(name: str, target: str, out: Path, drop_activations: bool, dtype: str | None, force: bool) -> None:
    """Write a model for another tool.

    For mlx-lm, any MLX program, mflux or DiffusionKit.
    The calibrated codes are written bit for bit; what the target has no place for is refused, by name. With archive the
    folder itself becomes one smaller file, and with folder such a file that folder again, byte for byte.
    """
    if target in PATHS:
        refuse({"dtype": dtype, "drop_activations": drop_activations or None}, "changes a model, and these are files")
        facts = export(Path(name), out, target, force=force, progress=progress)
        less = f", {1 - facts['bytes'] / facts['bytes_before']:.1%} less than {name}" if target == ARCHIVE else ""
        say(f"{out}: {size(facts['bytes'])}{less}")
        return result(facts)
    during_command(claimed(out, force))
    model = load_pipeline(name) if is_pipeline(name) else load(name)
    facts = export(model, out, target, drop_activations=drop_activations, dtype=dtype, force=force)
    layers, notes = facts["layers"], facts["notes"]
    if isinstance(layers, dict):  # of a pipeline, by component
        layers, notes = sum(layers.values()), [f"{name}: {note}" for name, some in notes.items() for note in some]
    bits = f"{facts['bits_per_weight']:.2f} bits per weight"
    say(f"{out}: {facts['bytes'] / 1e6:.2f} MB, {bits}, {layers} packed layers")
    for note in notes:
        say(f"  {note}")
    result(facts)


if __name__ == "__main__":
    command()
