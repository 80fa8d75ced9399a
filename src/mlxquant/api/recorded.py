"""Quantize any module in place, from what it was seen to do: ``quantize_module``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..calibration.recorded import RecordedCalibration
from ..errors import CalibrationError
from ..files import checked
from ..grids.keeping_time import Time, keep_time
from ..layers.attention import find_attentions
from ..layers.kinds import find_exact_layers
from ..layers.quantize_linears import kept_layers, layer_size
from ..layers.sizes import LayerSize, SizeReport, stored_bytes, weight_count
from ..layers.tree import module_of, set_module
from ..models.edges import Edge
from ..models.recorded.adapter import RecordedAdapter
from ..models.recorded.reach import require_traced_anew
from ..models.recorded.recording import Recording
from ..models.recorded.watching import uncompiled
from ..progress import Progress, silent
from ..recipes.grammar import parse_recipe
from ..recipes.recipe import Recipe
from ..sweep.share import Share, planned_share
from ..sweep.store import FolderStore
from ..sweep.sweep import sweep
from ..tuning.calls import Loss
from .model import Model
from .plan import plan
from .quantizing import kept_work, settle
from .tuning import CallTuning


@dataclass(frozen=True)
class ModuleReport:
    """What ``quantize_module`` did; prints as a table.

    Attributes:
        recipe: Its name.
        sizes: Bytes before and after, the error of each weight as it was rounded, before any scales were tuned, and why
            other layers stayed.
        blocks: The blocks between which the module was cut, in the order in which they run.
        whole: Why it was run whole and not block by block; "" where it was cut.
        calls: How many recorded calls it was calibrated on.
        stages: What was tried and kept, a dictionary of plain data for each stage.
        weighed: How errors were weighed, where the recipe wants that: "gradient" of what the module returns, or "block
            errors" where no gradient could be had; "" where they were not.
        facts: What else there is to say of how it came about, as plain data.
        share: How much of the module was to be quantized, and what stays in float, by reason.
    """

    recipe: str
    sizes: SizeReport
    blocks: tuple[str, ...]
    whole: str
    calls: int
    stages: list[dict[str, Any]]
    weighed: str
    facts: dict[str, Any]
    share: Share

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "sizes": self.sizes.facts, "blocks": list(self.blocks), "share": self.share.facts}

    def __str__(self) -> str:
        cut = f"run whole, since {self.whole}" if self.whole else f"cut into {len(self.blocks)} blocks"
        weighed = f", errors weighed by {self.weighed}" if self.weighed else ""
        return f"{self.recipe} on {self.calls} calls, {cut}{weighed}\n{self.sizes}\n{self.share}"


def quantize_module(
    module: nn.Module,
    seen: Recording,
    recipe: str | Recipe,
    *,
    blocks: Iterable[str] | None = None,
    time: Time | None = None,
    roles: Mapping[str, str] | None = None,
    edges: Sequence[Edge] = (),
    keep: Mapping[str, str] | None = None,
    again: Callable[[], Recording] | None = None,
    restores: bool = True,
    loss: Loss | None = None,
    work: str | Path | None = None,
    progress: Progress = silent,
) -> ModuleReport:
    """Quantize a module in place by any recipe, calibrated on recorded calls.

    The module is cut between its blocks and goes through the same sweep as every model here: two streams of hidden
    states side by side, gates that keep nothing which judges worse than rounding to nearest. Afterwards it runs in the
    pipeline that it came from; ``save_module`` writes it, ``load_module`` puts what was written into a fresh one. After
    an error, or Ctrl-C, it is as it was, unless ``restores`` says otherwise.

    Args:
        module: The module in full precision; it is changed.
        seen: What ``recording`` kept of its calls.
        recipe: A recipe or its name, such as ``"gptq-w4a16-g64"``.
        blocks: Paths of the modules between which it is cut; None for those in the module's own lists, () for none: it
            then runs whole for each step of the sweep, which is slow.
        time: Called with the arguments of a call, returns its noise level in [0,1], such as ``lambda x, t: t / 1000``.
            With it static tables have an entry a noise level, and the module sets its clock by it from now on.
        roles: What layers are for ("attention", "mlp", "modulation", "embedder" or "output"), by path, where the guess
            is not wanted; recipes treat the last three with care.
        edges: Which layers read the same tensor, and what can be folded into what wrote it, as an adapter has it; with
            them transforms cost nothing while the module runs.
        keep: Layers that stay as they are whatever the recipe says, by path, each with the reason, which the report
            repeats.
        again: For recipes of several rounds (``progressive``, ``tcaqdm``): called once the module is quantized, runs
            the pipeline again and returns what that recorded. The module is then quantized anew, from full precision,
            for what it was called with.
        restores: Whether the module is as it was after an error. Its layers in full precision are kept in memory for
            that until the end; without it each goes as soon as another stands in its place.
        loss: What tuned scales are to make small, for a recipe that is ``tuned``: called with what the module returns
            now and what it returned in full precision, arrays float32 by where they are in its result ("" for a result
            that is one array, else such as "0" or "sample"), returns a scalar for the call. None for the squared error
            of each array, relative to its mean square.
        work: A folder that keeps finished stages; a killed run goes on from there and ends with the same bytes. What
            ``loss`` computes is not known to it: use another folder with another loss.
        progress: Wraps stages and batches, and shows how far the run is.

    Returns:
        What was done.

    Raises:
        AdapterError: There are no blocks, or the calls are not computed again as they were recorded; the module goes
            by what ``mx.compile`` kept of earlier calls; an edge cannot be as it says.
        CalibrationError: Nothing was recorded, or of another module, or it is still going on; ``time`` gives no noise
            level.
        RecipeError: The recipe is unknown, does not fit the module, or wants a clock without ``time``.
        NumericsError: Weights or inputs hold NaN or infinite values.
        ArtifactError: ``work`` cannot be written, is another run's, or what it holds is damaged.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> import mlxquant as mq
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = [nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)) for _ in range(2)]
        ...     def __call__(self, x):
        ...         for block in self.blocks:
        ...             x = x + block(x)
        ...         return x
        >>> net = Net()
        >>> with mq.recording(net) as seen:
        ...     y = net(mx.random.normal((2, 5, 64)))
        >>> report = mq.quantize_module(net, seen, "gptq-w4a16-g64")
        >>> report.blocks
        ('blocks.0', 'blocks.1')
    """
    module = module_of(module)
    if seen.module is not module:
        raise CalibrationError(
            f"the recording is of another module (a {type(seen.module).__name__}) than the one to quantize (a"
            f" {type(module).__name__}); pass the very module that was recorded"
        )
    if seen.going_on:
        raise CalibrationError(
            f"calls of {type(module).__name__} are still being recorded; quantize it after the 'with' of its recording"
        )
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    folder = None if work is None else Path(work)
    if len(seen):
        require_traced_anew(module, seen[0])
    with uncompiled(), nullcontext() if folder is None else kept_work(folder):
        adapter = RecordedAdapter(seen, blocks, time, roles, edges, keep)
        adapter.renews = again is not None
        if recipe.rounds == 1 or again is None:  # which a recipe of several is refused without
            return _quantize(adapter, recipe, folder, progress, restores, loss)
        return _in_rounds(adapter, again, recipe, folder, progress, restores, loss, blocks, time, roles, edges, keep)


def _in_rounds(
    adapter: RecordedAdapter,
    again: Callable[[], Recording],
    recipe: Recipe,
    work: Path | None,
    progress: Progress,
    restores: bool,
    loss: Loss | None,
    *known: Any,
) -> ModuleReport:
    """Quantize several times, each after the first for what the module is called with by then; ``known`` is what else
    an adapter is made of.
    """
    module = adapter.module
    kind, originals = type(module), {**find_exact_layers(module), **find_attentions(module)}

    def restore() -> None:
        module.__class__ = kind  # a class that keeps time has the clock of its round
        for path, layer in originals.items():
            set_module(module, path, layer)

    for turn in range(recipe.rounds):
        if turn:
            try:
                drawn = again()
            finally:
                restore()
            adapter = RecordedAdapter(drawn.answered_anew(), *known)
            adapter.renews = True
        folder = None if work is None else work / f"round-{turn + 1}"
        last = turn == recipe.rounds - 1
        report = _quantize(adapter, recipe if last else replace(recipe, tuning=None), folder, progress, restores, loss)
    return report


def _quantize(
    adapter: RecordedAdapter,
    recipe: Recipe,
    work: Path | None,
    progress: Progress,
    restores: bool,
    loss: Loss | None = None,
) -> ModuleReport:
    model, calib = Model(adapter), RecordedCalibration(adapter)
    layers = plan(model, recipe)
    share = planned_share(adapter, layers)
    adapter.check_finite()
    module, before = adapter.module, stored_bytes(adapter.module)
    weights, reasons = weight_count(module), adapter.left_out()
    settled = settle(model, calib, recipe, layers, work, progress)
    given, allocated, facts = settled.recipe, settled.plan, settled.facts
    made = {**facts, "recipe": given.to_dict(), "calibration": calib.record, "blocks": [s.name for s in adapter.stages]}
    codes = made | {"recipe": replace(given, tuning=None).to_dict()}
    store = None if work is None else FolderStore(work, checked.digest(codes | checked.versions()))
    tuning = None if given.tuning is None else CallTuning(adapter, given.tuning, loss, made, work, progress)
    originals, sizes = dict[str, nn.Module](), dict[str, LayerSize]()

    def replaced(path: str, before: nn.Module, after: nn.Module) -> None:
        if path in allocated:
            sizes[path] = layer_size(path, before, after)
        if restores:
            originals[path] = before

    def retuned(path: str, before: nn.Module, after: nn.Module) -> None:
        sizes[path] = replace(sizes[path], format=str(after.format), after=after.nbytes)

    try:
        stages = sweep(adapter, calib, given, store, progress, work, allocated, replaced, settled.curvature)
        if tuning is not None:
            made["tuning"] = tuning.tune(retuned)
    except BaseException:
        for path, layer in originals.items():
            set_module(module, path, layer)
        raise
    if adapter.time is not None:
        keep_time(module, adapter.clock, adapter.time)
    weighed = ""
    if given.sensitivity or recipe.allocates:
        by_blocks = any(one.get("weighed") for one in (facts.get("allocation", {}), *stages))
        weighed = "block errors" if by_blocks else "gradient"
    layers_made = tuple(sizes[path] for path in allocated)
    report = SizeReport(layers_made, kept_layers(module, reasons), before, stored_bytes(module), weights)
    names = tuple(stage.name for stage in adapter.blocks)
    return ModuleReport(recipe.name, report, names, adapter.broken, len(adapter.seen), stages, weighed, made, share)
