"""Activation statistics of a model, collected in memory: what the decisions ask for, without the files of the
pipeline.
"""

from dataclasses import dataclass, field

import mlx.core as mx

import mlxquant as mq
from mlxquant.calibration.passes import Passes
from mlxquant.curvature.sensitivity import Sensitivity, measure
from mlxquant.layers.tree import tapped
from mlxquant.numerics.input_ranges import RANGE_BATCH
from mlxquant.sweep.collecting import Collector
from mlxquant.sweep.inputs import may_shift


@dataclass
class Stats:
    """What activation statistics are asked for, collected without files; the shift is the centre of the extremes."""

    source: str
    layers: list[str]
    collector: Collector
    costs: Sensitivity
    gelu: set[str]
    model: str = "mmdit-shapes"
    sha256: str = "5" * 64
    calibration: str = "c" * 64
    off_centre: float = 0.0
    range_batch: int = 2
    step_keys: list[str] = field(default_factory=list)

    @property
    def sigmas(self):
        return self.ranges(self.layers[0]).sigma

    def ranges(self, path):
        return self.collector[path].ranges

    def sensitivity(self, path):
        return self.costs.layers[path]

    def shift(self, path):
        ranges = self.ranges(path)
        return (ranges.least + ranges.most) / 2 + self.off_centre if path in self.gelu else None


def collect(adapter, steps=3, range_batch=RANGE_BATCH):
    calibration = mq.calibrate(mq.Model(adapter), prompts=2, steps=steps)
    edges = adapter.edges()
    layers = [path for edge in edges for path in edge.consumers]
    collector = Collector(adapter.layers(), sides=calibration.sides, range_batch=range_batch)
    sigmas, states = calibration.batches(adapter)
    costs = measure(Passes(adapter, sigmas), adapter.stages, states, layers)
    with tapped(adapter.module, layers, collector):
        for sigma, state in zip(sigmas, states, strict=True):
            collector.sigma = sigma
            with adapter.clock.at(sigma):
                for stage in adapter.stages:
                    state = stage.run(state)
                mx.eval(state)
    gelu = {path for edge in edges if may_shift(edge.after) for path in edge.consumers}
    keys = [f"step_{i}" for i in reversed(range(steps))]
    return Stats(adapter.fingerprint, layers, collector, costs, gelu, range_batch=min(range_batch, 2), step_keys=keys)
