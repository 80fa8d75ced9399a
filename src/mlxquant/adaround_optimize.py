"""``mlxquant adaround-optimize``: learn how the weights of every block are rounded, from the block cache."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .calibration.passes import Passes
from .commandline.console import Command, during_command, peak_bytes, progress, result, say
from .commandline.options import COUNT, PATH, model_option, option, seed_option, verbose_option
from .curvature.sensitivity import measured
from .errors import AdapterError
from .files import checked
from .files.checked import file_digest
from .files.lock import locked
from .grids.tables import BITS
from .methods.weights.adaround import Settings
from .models.catalog import model_name, pretrained
from .models.diffusion import DiffusionAdapter, diffusion
from .pipeline.apply import check, prepare
from .pipeline.block_cache import BlockCache, CachedTeacher
from .pipeline.ledger import Ledger
from .pipeline.quant_config import QuantConfig
from .pipeline.weight_files import CONFIG, KIND, WeightFiles
from .recipes.grammar import parse_spec, parse_template
from .recipes.recipe import Recipe
from .sweep.layer import Preset
from .sweep.sweep import Sweep
from .sweep.trial import Job

STARTS = {"nearest": "rtn+search", "gptq": "gptq", "qronos": "gptq+corrected"}  # how a recipe would say it
DEFAULT = Settings()


@click.command("adaround-optimize", cls=Command)
@option("--cache-dir", type=PATH, required=True, help="Folder that 'mlxquant cache-adaround-data' wrote.")
@option("--calib-dir", type=PATH, help="Where the trajectories are now.  [default: the folder around the cache's]")
@option("--output-dir", type=PATH, required=True, help="Folder for config.json and weights/mm*.npz.")
@option("--bits-w", type=click.IntRange(2, 8), default=4, help="Bits of attention and MLP weights.")
@option(
    "--bits-a",
    type=click.Choice([str(b) for b in BITS]),
    default="8",
    help="Bits of activations, where --quant-config does not choose them; 16: as they are.",
)
@option("--iters", type=COUNT, default=DEFAULT.iterations, help="Adam steps a block.")
@option("--start", type=click.Choice(list(STARTS)), default="gptq", help="Codes that learning starts from.")
@option("--batch-size", type=COUNT, default=DEFAULT.batch, help="Samples a step, of mixed timesteps.")
@option("--learning-rate", type=float, default=DEFAULT.rate)
@option("--pressure", type=float, default=DEFAULT.pressure, help="Weight of the rounding regulariser.")
@option(
    "--qdrop", type=click.FloatRange(0, 1), default=DEFAULT.drop, help="Probability to leave an activation unquantized."
)
@option("--sensitivity/--no-sensitivity", default=True, help="Weigh errors by what they do to the velocity.")
@option("--quant-config", type=PATH, help="Round the weights as this file's folds and shifts change them.")
@model_option("name", help="Where its weights are: a hub id or a folder.  [default: the name of the cache's model]")
@seed_option("Of the minibatches.")
@option("--force", is_flag=True, help="Start over where the folder holds other weights.")
@option("--resume/--no-resume", default=True, help="Go on where a killed run was.")
@verbose_option
def command(
    cache_dir: Path,
    calib_dir: Path | None,
    output_dir: Path,
    bits_w: int,
    bits_a: str,
    iters: int,
    start: str,
    batch_size: int,
    learning_rate: float,
    pressure: float,
    qdrop: float,
    sensitivity: bool,
    quant_config: Path | None,
    name: str | None,
    seed: int,
    force: bool,
    resume: bool,
) -> None:
    """Learn how every block's weights are rounded.

    What counts is what the block writes: --cache-dir has what it should.
    """
    began = time.perf_counter()
    learning = Settings(iters, batch_size, learning_rate, pressure, drop=qdrop, seed=seed)
    cache = BlockCache.read(cache_dir)
    if model_name(name) not in (None, cache.model):
        raise AdapterError(
            f"{cache_dir} is of model {cache.model!r}, not of {name!r}; leave --model out or cache that model"
        )
    adapter = diffusion(pretrained(name or cache.model))
    cache.check(adapter)
    presets: dict[str, Preset] = {}
    if quant_config is not None:
        decided = QuantConfig.read(quant_config)
        check(decided, cache.model, cache.source, cache.calibration, cache.ledger.path)
        presets = prepare(adapter, decided)
    recipe = block_recipe(bits_w, int(bits_a), start, learning, sensitivity)
    facts = {
        "model": cache.model,
        "source": cache.source,
        "calibration": cache.calibration,
        "parents": {"metadata.json": cache.sha256},
        "quant_config": None if quant_config is None else file_digest(quant_config),
        "bits_w": bits_w,
        "bits_a": int(bits_a),
        "iters": iters,
        "start": start,
        "recipe": recipe.to_dict(),
        "versions": checked.versions(),
    }
    during_command(locked(output_dir, inside=True))
    ledger = Ledger.open(output_dir / CONFIG, KIND, facts, "adaround-optimize", force, resume)
    during_command(ledger.same_blas())
    if ledger.complete:
        say(f"{output_dir} is finished already, with these settings; --force would learn it again")
    else:
        learn(adapter, recipe, cache, calib_dir, presets, ledger, resume)
    report = dict(sorted(ledger.notes["blocks"].items(), key=lambda block: int(block[0].removeprefix("mm"))))
    say(f"{'block':<8}{'kept':<12}{'learned':>10}{'start':>10}{'rtn':>10}{'flipped':>9}{'steps':>7}")
    for block, outcome in report.items():
        say(row(block, outcome))
    errors = [outcome.get("errors", {}) for outcome in report.values()]
    learned = [tried for tried in errors if "learned" in tried]  # a block may have nothing to learn
    won = sum(map(wins, learned)) / max(1, len(learned))
    say(f"learned codes are better than all others in {won:.0%} of the blocks; {output_dir / CONFIG}")
    result(
        {
            "output": str(output_dir),
            "blocks": len(report),
            "win_rate": won,
            "seconds": time.perf_counter() - began,
            "peak_bytes": peak_bytes(),
        }
    )


def learn(
    adapter: DiffusionAdapter,
    recipe: Recipe,
    cache: BlockCache,
    calib_dir: Path | None,
    presets: dict[str, Preset],
    ledger: Ledger,
    resume: bool = True,
) -> None:
    """Run the blocks through the sweep, from the cache's states towards the cache's targets, into the ledger's
    folder.
    """
    blocks = adapter.blocks
    linears = adapter.block_linears()
    plan = recipe.plan({path: adapter.role(path) for path in linears})
    sigmas, states = cache.inputs(adapter, calib_dir, adapter.batch)
    passes = Passes(adapter, sigmas, progress)
    costs = measured(passes, adapter.stages[1:], states, plan) if recipe.sensitivity else None
    both = any(spec.cross for spec in plan.values())
    teacher = CachedTeacher(cache, passes, states, both)
    files = WeightFiles(ledger, blocks, linears)
    if not resume:
        files.clear_checkpoints()
    Sweep(Job(passes, recipe, plan, teacher, presets, costs)).run(blocks, states, files)
    files.finish()


def block_recipe(bits_w: int, bits_a: int, start: str, learning: Settings, sensitivity: bool) -> Recipe:
    """Attention and MLP weights learned, modulation rounded to 8 bits: at 4 its error enters every block at
    every step.
    """
    template = parse_template(f"{STARTS[start]}+learned")
    return replace(
        template.recipe,
        name=f"adaround-{start}-w{bits_w}a{bits_a}",
        rules=(("@modulation", parse_spec("w8a16")), ("*", parse_spec(f"w{bits_w}a{bits_a}", template))),
        learning=learning,
        sensitivity=sensitivity,
    )


def wins(errors: dict[str, float]) -> bool:
    """Whether the learned codes of a block are strictly better than everything else that was tried."""
    return errors["learned"] < min(error for name, error in errors.items() if name != "learned")


def row(block: str, facts: dict[str, Any]) -> str:
    """A block's line in the table: errors of what it writes, hard-rounded, and how it was learned where that
    was kept.
    """
    errors, learning = facts.get("errors", {}), facts.get("learning")
    figures = "".join(
        f"{errors[name]:>10.2e}" if name in errors else f"{'':>10}" for name in ("learned", "calibrated", "rtn")
    )
    learned = "" if learning is None else f"{learning['flipped']:>9.1%}{learning['iterations']:>7}"
    return f"{block:<8}{facts['kept']:<12}{figures}{learned}"


if __name__ == "__main__":
    command()
