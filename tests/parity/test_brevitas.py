"""GPTQ and Qronos against brevitas: the same grid, the same data, float64 on both sides.

Without brevitas these tests are skipped, and where MLXQUANT_REQUIRE_PARITY is set they fail. ``pip install
'mlxquant[parity]'``; it needs a CPU build of torch.
"""

import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.gptq import gptq
from mlxquant.methods.weights.qronos import qronos
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.moments import Moments

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def brevitas():
    """torch, and of brevitas the two methods and the layer that they work on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional kernels, and of deprecations in torch
            import brevitas.nn
            import torch
            from brevitas.graph.gptq import GPTQ
            from brevitas.graph.gpxq import LayerHandler
            from brevitas.graph.qronos import Qronos
            from brevitas.quant import Int8WeightPerChannelFloat
    except ImportError as error:
        refuse = pytest.fail if os.environ.get("MLXQUANT_REQUIRE_PARITY") else pytest.skip
        refuse(f"brevitas does not import ({error}); pip install 'mlxquant[parity]'")
    return SimpleNamespace(
        torch=torch,
        linear=brevitas.nn.QuantLinear,
        GPTQ=GPTQ,
        Qronos=Qronos,
        handler=LayerHandler,
        format=Int8WeightPerChannelFloat,
    )


@pytest.fixture(scope="module", params=[3, 4])
def problem(request):
    """A weight [96,256], X and X~ [1024,256] with outlier channels, and two grids."""
    random = np.random.default_rng(request.param)
    weight = random.standard_t(5, (96, 256)) * 0.02
    exact = random.standard_normal((1024, 256)) @ (random.standard_normal((256, 256)) * (1 + np.arange(256)) ** -0.5)
    exact[:, random.choice(256, 4, replace=False)] *= 20
    seen = exact @ (np.eye(256) + 0.02 * random.standard_normal((256, 256))) + 0.05 * random.standard_normal(
        exact.shape
    ) * exact.std(0)
    moments = Moments.empty(256, np.float64)
    moments.add(seen, exact)
    format = WeightFormat(request.param)
    return weight, exact, seen, moments, (extremes(weight, format), search(weight, format, moments))


def theirs(brevitas, method, weight, grid, *streams, **options):
    """The codes that brevitas gives: ``streams`` are the inputs of the quantized layer and, where it looks at them, of
    the exact one.
    """
    torch, format = brevitas.torch, grid.format
    steps = torch.tensor(grid.scales.astype(np.float64))
    layer = brevitas.linear(
        weight.shape[1], weight.shape[0], bias=False, weight_quant=brevitas.format, weight_bit_width=format.bits,
        dtype=torch.float64,
        weight_narrow_range=False, weight_scaling_impl_type="const", weight_scaling_init=steps * format.zero_code,
    )  # fmt: skip
    layer.weight.data = torch.tensor(weight)
    layer.weight_quant.init_tensor_quant()
    layer.eval()
    work = method(
        layer, "layer", act_order=True, len_parallel_layers=len(streams) + 1, create_weight_orig=True, num_blocks=8,
        dtype=torch.float64, **options,
    )  # fmt: skip
    with torch.no_grad():
        for quantized, inputs in zip((True, False), streams, strict=False):
            layer.weight_quant.disable_quant = not quantized
            work.update_batch(layer, (torch.tensor(inputs),), brevitas.handler())
        layer.weight_quant.disable_quant = False
        work.single_layer_update()
        return np.rint(layer.quant_weight().value.numpy() / steps.numpy()).astype(int) + format.zero_code


def close(weight, grid, ours, others, exact, seen):
    """At least 99.8 % of the codes agree, and the output errors are within a thousandth."""
    errors = [np.linalg.norm(exact @ weight.T - seen @ grid.dequantize(codes).T) for codes in (ours, others)]
    assert (ours == others).mean() >= 0.998
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_gptq(brevitas, problem):
    weight, _, seen, moments, grids = problem
    for grid in grids:
        close(
            weight, grid, gptq(weight, grid, moments), theirs(brevitas, brevitas.GPTQ, weight, grid, seen), seen, seen
        )


def test_qronos(brevitas, problem):
    weight, exact, seen, moments, grids = problem
    damping = 1e-6 * np.linalg.eigvalsh(moments.gram)[-1] / np.diagonal(moments.gram).mean()  # as brevitas has it
    for grid in grids:
        ours = qronos(weight, grid, moments, damping=damping)
        close(weight, grid, ours, theirs(brevitas, brevitas.Qronos, weight, grid, seen, exact), exact, seen)
