"""``mlxquant analyze-activations``: from activation statistics to bits, steps and shifts for every layer and
timestep.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from .api.loading import load
from .commandline.console import Command, during_command, progress, result, say
from .commandline.options import PATH, model_option, option, verbose_option
from .errors import ArtifactError
from .files.atomic import ensure_writable
from .files.lock import locked
from .layers.tree import starred
from .methods.inputs.tiers import BUDGET, TIERS
from .pipeline import temporal
from .pipeline.activation_stats import ActivationStats
from .pipeline.decisions import decide, made_from
from .pipeline.quant_config import QuantConfig
from .report.comparison import save_png
from .report.tiers import draw_tiers
from .sweep.inputs import Options

ANALYSIS, PICTURE = "layer_temporal_analysis.json", "quant_ranges.png"


def two_numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected two numbers such as 6,10, found {value!r}") from error
    return low, high


@click.command("analyze-activations", cls=Command)
@option("--stats", "stats_file", type=PATH, required=True, help="layer_statistics.json of collect-layer-activations.")
@option("--output", type=PATH, help="The config to write.  [default: quant_config.json beside the statistics]")
@model_option("name", help="Where the model is: a hub id or a folder.  [default: the model of the statistics]")
@option(
    "--rule",
    type=click.Choice(["error", "threshold"]),
    default="error",
    help="Fewest bits within an error budget, or by the magnitude of the range.",
)
@option(
    "--budget",
    default=BUDGET,
    help="Mean squared error of the velocity that --rule error lets each layer's input cause.",
)
@option("--thresholds", default="6,10", callback=two_numbers, help="Of --rule threshold: A4 below the first, A6 below.")
@option(
    "--range",
    "range_method",
    type=click.Choice(["extremes", "average", "error"]),
    default="extremes",
    help="What the codes span. 'average' is TaQ-DiT's: the mean of the extremes of batches, of --range-batch images in"
    " collect-layer-activations. The smaller those, the more it clips.",
)
@option("--alpha", type=click.FloatRange(0, 1), default=0.5, help="How much SmoothQuant moves into the weights.")
@option("--migration", is_flag=True, help="Try to even out post-GELU channels by integers, too.")
@option("--force", is_flag=True, help="Replace existing files.")
@verbose_option
def command(
    stats_file: Path,
    output: Path | None,
    name: str | None,
    rule: str,
    budget: float,
    thresholds: tuple[float, float],
    range_method: str,
    alpha: float,
    migration: bool,
    force: bool,
) -> None:
    """Decide how inputs are quantized at each timestep.

    Layer by layer, from the statistics of collect-layer-activations.
    """
    options = Options(rule, budget, thresholds, range_method, alpha, migration)
    output = output or stats_file.with_name("quant_config.json")
    analysis, picture = output.with_name(ANALYSIS), output.with_name(PICTURE)
    during_command(locked(analysis))
    check_outputs(stats_file, output, analysis, force)
    stats = ActivationStats.read(stats_file)
    ensure_writable(output.absolute().parent)
    if (found := finished(output, made_from(stats, options), force)) is not None:
        say(f"{output} is finished already, with these settings")
    config = found or decide(stats, load(name or stats.model).adapter, options, progress)
    facts = temporal.analyze(config)
    bits = {path: table.bits for path, table in config.plain.items()}
    title = f"{config.facts['model']}: {config.mean_bits:.2f} bits on average, by {rule}"
    if found is None:
        save_png(draw_tiers(config.sigmas, bits, temporal.ranges(config), title), picture)
        temporal.write(analysis, facts, config, output.name)
        config.write(output)  # last: where it is, the rest is
    counts = Counter(int(b) for row in bits.values() for b in row)
    say_table(config)
    result(
        {
            "output": str(output),
            "layers": len(bits),
            "timesteps": len(config.sigmas),
            "range_batch": stats.range_batch,
            "mean_bits": config.mean_bits,
            "counts": {str(tier): counts[tier] for tier in TIERS},
            "switchers": len(facts["switchers"]),
            "always_a8": len(facts["always_a8"]),
            "shifted": sum(layer["shifted"] for layer in config.layers.values()),
            "smoothed": len(config.divisors),
            "migrated": len(config.migrations),
        }
    )


def check_outputs(stats_file: Path, output: Path, analysis: Path, force: bool) -> None:
    """Raise ArtifactError, before any work, when the config cannot have its name or its folder has another config's
    analysis.
    """
    if output.suffix != ".json" or output.absolute() == stats_file.absolute():
        raise ArtifactError(
            f"{output}: expected a name for the config that ends in .json and is not that of the statistics"
        )
    if output.is_dir():
        raise ArtifactError(f"{output} is a folder; choose a name for the config")
    if output == analysis:
        raise ArtifactError(
            f"{output} is the name of the temporal analysis, which is written beside the config; choose another"
        )
    if analysis.exists() and not force and (other := temporal.config_of(analysis)) != output.name:
        raise ArtifactError(
            f"{analysis} exists and is of {other}; choose an --output in a folder of its own, or pass --force to"
            " replace it"
        )


def finished(output: Path, facts: dict[str, Any], force: bool) -> QuantConfig | None:
    """The config that is there already, when it was decided from the same; raises ArtifactError when it is another and
    not ``force``.
    """
    if force or not output.exists():
        return None
    config = QuantConfig.read(output)
    if config.facts != facts:
        changed = sorted(key for key in facts.keys() | config.facts.keys() if facts.get(key) != config.facts.get(key))
        raise ArtifactError(
            f"{output} exists and was made from other {', '.join(changed)}; choose another --output or pass --force"
        )
    return config


def say_table(config: QuantConfig) -> None:
    """Layers by kind: how many of their timesteps are in each tier, the mean squared velocity error that rounding a
    layer's input causes, and the mean relative error of its output.
    """
    kinds: dict[str, list[str]] = {}
    for path in config.plain:
        kinds.setdefault(starred(path), []).append(path)
    width = max(map(len, kinds))
    say(
        f"{'layers':{width}} "
        + "".join(f"{f'A{tier}':>7}" for tier in TIERS)
        + f"{'mean':>7}{'velocity':>11}{'output':>9}"
    )
    for kind, paths in kinds.items():
        bits = np.stack([config.plain[path].bits for path in paths])
        cost, error = (
            float(np.mean([config.layers[path][name] for path in paths])) for name in ("error", "relative_error")
        )
        counts = "".join(f"{int((bits == tier).sum()):7}" for tier in TIERS)
        say(f"{kind:{width}} {counts}{bits.mean():7.2f}{cost:11.2e}{error:9.4f}")
    tried = [layer for layer in config.layers.values() if "error_shifted" in layer]
    say(
        f"mean {config.mean_bits:.2f} bits; shifted: {sum(layer['shifted'] for layer in tried)} of {len(tried)}"
        " post-GELU inputs"
    )
    say(
        f"SmoothQuant: {len(config.divisors)} of {len(config.smoothquant)} candidates lower the error;"
        f" {len(config.migrations)} migrated"
    )


if __name__ == "__main__":
    command()
