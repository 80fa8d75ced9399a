"""What is known of mflux's transformers: noise levels, and edges that tell the truth."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.models.mflux.families import Host, host_of
from mlxquant.models.mflux.pipeline import MfluxPipeline
from mlxquant.models.recorded.adapter import RecordedAdapter
from mlxquant.sweep.folding import check_folds

from support.mflux_checkpoints import small_models
from support.mflux_quantized import DRAWN, SIZE, dense

pytestmark = [pytest.mark.mflux, pytest.mark.slow]
STEPS = 3


def recorded(name):
    with small_models():
        pipeline = MfluxPipeline.load(str(dense(name)))
        with mq.recording(pipeline.pipeline.transformer) as seen:
            pipeline.draw(DRAWN, STEPS, size=SIZE)
    return seen


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("dev", 2 * 7 + 2 * 3 + 1),
        ("qwen-image", 2 * 7),
        ("z-image-turbo", 4 * 4),
        ("flux2-klein-4b", 2 * 3 + 2 * 2),
        ("flux3-image-klein", 0),
        ("ernie-image-turbo", 0),
    ],
)
def test_edges_are_true_and_levels_fall(name, edges):
    seen = recorded(name)
    host = host_of(seen.module)
    assert len(host.edges) == edges
    with small_models():
        adapter = RecordedAdapter(seen, time=host.time, edges=host.edges)
        check_folds(adapter, adapter.state(1), adapter.sigmas[1], 1e-4)
    levels = np.array(adapter.sigmas)
    assert levels[0] > 0.9
    assert (np.diff(np.unique(levels)[::-1]) < 0).all()
    assert len(np.unique(levels)) == STEPS
    assert levels.min() > 0


def test_a_transform_goes_into_what_writes_a_tensor():
    seen = recorded("z-image-turbo")
    host = host_of(seen.module)
    with small_models():
        mq.quantize_module(seen.module, seen, "gptq+smoothquant-w4a8", time=host.time, edges=host.edges)
    layer = seen.module.layers[0].attention.to_q
    assert layer.divisor is None or "divisor" not in layer
    gains = seen.module.layers[0].attention_norm1.weight
    assert gains.dtype == mx.float32


def test_of_others_nothing_is_known():
    assert host_of(nn.Linear(2, 2)) == Host()
