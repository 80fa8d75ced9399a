"""Two-sided rounding against a plain double loop, GPTQ, and all there is of small weights."""

from itertools import product

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.methods.weights.gptq import damped_problem, gptq, nearest_plane
from mlxquant.methods.weights.kron import kron, kronecker_loss, two_sided
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.cholesky import Factor
from mlxquant.numerics.moments import Moments


def correlated(random, size, tokens=None):
    """A Hessian [size,size] of inputs that have much in common, as those of layers have."""
    rows = random.standard_normal((tokens or 4 * size, size)) @ random.standard_normal((size, size))
    return rows.T @ rows


def moments_of(inputs, outputs=None):
    found = Moments(inputs, len(inputs))
    found.outputs = outputs
    return found


def problem(seed, height, width, text="w4"):
    random = np.random.default_rng(seed)
    weight = random.standard_t(5, (height, width)) * 0.02
    moments = moments_of(correlated(random, width), correlated(random, height))
    return weight, search(weight, WeightFormat.parse(text), moments), moments


def loss(weight, grid, codes, moments):
    error = weight - grid.dequantize(codes)
    return np.trace(moments.outputs @ error @ moments.gram @ error.T)


def damped(hessian, damping):
    return damped_problem(hessian[:1], hessian, damping)[1]


def plain_loop(weight, grid, hessian_in, hessian_out):
    """A weight's codes one by one, from the last row's last column, in float64: what is rounded is
    w_ij + F_ij + Σ_i'>i f_O(i',i) (D_i'j + F_i'j), with F_ij = Σ_j'>j D_ij' f_I(j',j).
    """
    (height, width), rows, columns = weight.shape, *(np.argsort(np.diagonal(h)) for h in (hessian_out, hessian_in))
    lower_out = np.linalg.cholesky(hessian_out[rows][:, rows])
    lower_in = np.linalg.cholesky(hessian_in[columns][:, columns])
    scales, biases = (
        np.broadcast_to(grid.expand(v.astype(np.float64), width), weight.shape) for v in (grid.scales, grid.biases)
    )
    lost, fed, codes = np.zeros((height, width)), np.zeros((height, width)), np.empty((height, width), np.uint8)
    for i in reversed(range(height)):
        for j in reversed(range(width)):
            w, scale, bias = (values[rows[i], columns[j]] for values in (weight, scales, biases))
            fed[i, j] = sum(lost[i, k] * lower_in[k, j] / lower_in[j, j] for k in range(j + 1, width))
            above = sum(lower_out[k, i] / lower_out[i, i] * (lost[k, j] + fed[k, j]) for k in range(i + 1, height))
            code = min(max(round((w + fed[i, j] + above - bias) / scale), 0), grid.format.levels - 1)
            lost[i, j], codes[rows[i], columns[j]] = w - (code * scale + bias), code
    return codes


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4-asym", "w8", "w4-tensor"])
@pytest.mark.parametrize(("height", "width"), [(13, 21), (1, 17), (17, 1), (33, 6)])
def test_codes_of_the_plain_loop(text, height, width):
    weight, grid, moments = problem(height, height, width, text)
    inputs, outputs = damped(moments.gram, 0.01), damped(moments.outputs, 0.05)
    expected = plain_loop(weight, grid, inputs, outputs)
    for block in (1, 4, 5, 32):
        codes, left = two_sided(weight, grid, Factor.of(inputs), Factor.of(outputs), block)
        np.testing.assert_array_equal(codes, expected, err_msg=f"block {block}")
        own = moments_of(inputs, outputs)
        np.testing.assert_allclose(left, loss(weight, grid, codes, own), rtol=1e-4)  # scales times codes in float32
    assert loss(weight, grid, expected, moments) <= loss(weight, grid, rtn(weight, grid), moments)
    np.testing.assert_array_equal(kron(weight, grid, moments), expected)


@pytest.mark.parametrize("text", ["w4-g32", "w3-g32-sym", "w2-g64", "w4-g64-bf16"])
def test_codes_of_the_plain_loop_in_groups(text):
    weight, grid, moments = problem(5, 11, 64, text)
    expected = plain_loop(weight, grid, damped(moments.gram, 0.01), damped(moments.outputs, 0.05))
    for block in (1, 7, 32, 100):
        np.testing.assert_array_equal(kron(weight, grid, moments, block=block), expected, err_msg=f"block {block}")


@pytest.mark.parametrize(("height", "width"), [(7, 5), (30, 600), (600, 30)])
def test_the_loss_by_factors_is_the_trace(height, width):
    random = np.random.default_rng(0)
    error, inputs, outputs = random.normal(size=(height, width)), correlated(random, width), correlated(random, height)
    wanted = np.trace(outputs @ error @ inputs @ error.T)
    np.testing.assert_allclose(kronecker_loss(error, Factor.of(inputs), Factor.of(outputs)), wanted, rtol=1e-9)


def test_options_are_the_dampings():
    weight, grid, moments = problem(2, 12, 16, "w3")
    expected = plain_loop(weight, grid, damped(moments.gram, 0.1), damped(moments.outputs, 0.5))
    np.testing.assert_array_equal(kron(weight, grid, moments, damping=0.1, output_damping=0.5), expected)
    assert (expected != kron(weight, grid, moments)).any()


@pytest.mark.parametrize("text", ["w2", "w4", "w4-asym", "w4-g32"])
def test_outputs_that_have_nothing_in_common_are_gptqs(text):
    weight, grid, moments = problem(3, 40, 64, text)
    target, hessian = damped_problem(weight, moments.gram, 0.01)
    inputs, white = Factor.of(hessian), Factor.of(damped(np.eye(40), 0.05))
    np.testing.assert_array_equal(two_sided(target, grid, inputs, white)[0], nearest_plane(target, grid, inputs))
    some, powers = np.diag(np.arange(40.0)), np.diag(4.0 ** np.arange(40))
    for outputs in (np.eye(40), 7 * np.eye(40, dtype=np.float32), np.zeros((40, 40)), some, powers, None):
        np.testing.assert_array_equal(
            kron(weight, grid, moments_of(moments.gram, outputs)), gptq(weight, grid, moments)
        )


def test_without_outputs_options_are_gptqs():
    weight, grid, moments = problem(3, 40, 64, "w3")
    alone = moments_of(moments.gram)
    np.testing.assert_array_equal(kron(weight, grid, alone, damping=0.3), gptq(weight, grid, alone, damping=0.3))


@pytest.mark.parametrize(("bits", "most", "usual"), [(2, 0.9, 0.7), (3, 0.85, 0.6), (4, 0.7, 0.5)])
def test_it_gains_on_every_problem(bits, most, usual):
    """Of 40 each: at most .86, .81 and .65 of GPTQ's loss, .65, .55 and .48 on average; of rounding's .40, .28, .23."""
    shares = []
    for seed in range(40):
        weight, grid, moments = problem(seed, 24, 40, f"w{bits}")
        ours, columns, nearest = (loss(weight, grid, f(weight, grid, moments), moments) for f in (kron, gptq, rtn))
        shares.append((ours / columns, ours / nearest))
    assert (np.max(shares, 0) < (most, 0.6)).all()
    assert (np.mean(shares, 0) < (usual, 0.41)).all()


def test_rows_and_columns_in_another_order_get_the_same_codes():
    weight, grid, moments = problem(9, 19, 23)
    random = np.random.default_rng(1)
    rows, columns = random.permutation(19), random.permutation(23)
    moved = moments_of(moments.gram[np.ix_(columns, columns)], moments.outputs[np.ix_(rows, rows)])
    other = Grid(grid.format, grid.scales[rows], grid.biases[rows])
    np.testing.assert_array_equal(
        kron(weight[np.ix_(rows, columns)], other, moved), kron(weight, grid, moments)[np.ix_(rows, columns)]
    )


def test_units_of_inputs_and_outputs_do_not_matter():
    weight, grid, moments = problem(9, 19, 23)
    for inputs, outputs in ((2.0**40, 1), (1, 2.0**-40), (2.0**-30, 2.0**30)):
        np.testing.assert_array_equal(
            kron(weight, grid, moments_of(inputs * moments.gram, outputs * moments.outputs)),
            kron(weight, grid, moments),
        )


def test_all_codes_of_a_small_weight():
    """Of 3 x 3 at 2 bits there are 4^9. Usually the loss is 1.2 times the least there is, where GPTQ's is twice. Three
    times it was the range that stood in the way, and rounding to nearest was kept.
    """
    every = np.array(list(product(range(4), repeat=9)), np.uint8).reshape(-1, 3, 3)
    shares = []
    for seed in range(16):
        random = np.random.default_rng(seed)
        weight = random.standard_normal((3, 3))
        moments = moments_of(correlated(random, 3), correlated(random, 3))
        grid = extremes(weight, WeightFormat(2))
        errors = (weight - (every * grid.scales + grid.biases)).reshape(len(every), 9)
        least = np.einsum("ni,ni->n", errors @ np.kron(moments.outputs, moments.gram), errors).min()
        codes = kron(weight, grid, moments, damping=1e-6, output_damping=1e-6)
        ours, nearest = (loss(weight, grid, some, moments) for some in (codes, rtn(weight, grid)))
        assert least * (1 - 1e-6) <= ours <= nearest
        shares.append((ours / least, ours / nearest, loss(weight, grid, gptq(weight, grid, moments), moments) / least))
    best, nearest, columns = np.median(shares, 0)
    assert best < 1.3
    assert nearest < 0.6
    assert columns > 1.5


def test_dead_outputs_are_rounded_for_themselves_and_leave_the_others_alone():
    weight, grid, moments = problem(4, 20, 32)
    dead, outputs = [0, 7, 19], moments.outputs.copy()
    outputs[dead], outputs[:, dead] = 0, 0
    live = np.setdiff1d(np.arange(20), dead)
    codes = kron(weight, grid, moments_of(moments.gram, outputs))
    own = Grid(grid.format, grid.scales[live], grid.biases[live])
    # the mean of the diagonal is over all outputs; keep the damping the same
    damping = 0.05 * len(live) / 20
    alone = moments_of(moments.gram, outputs[np.ix_(live, live)])
    np.testing.assert_array_equal(codes[live], kron(weight[live], own, alone, output_damping=damping))
    np.testing.assert_array_equal(codes[dead], gptq(weight, grid, moments)[dead])


def test_dead_inputs_go_to_zero_and_leave_the_others_alone():
    weight, grid, moments = problem(4, 20, 32)
    dead, gram = [0, 17, 31], moments.gram.copy()
    gram[dead], gram[:, dead] = 0, 0
    live = np.setdiff1d(np.arange(32), dead)
    codes = kron(weight, grid, moments_of(gram, moments.outputs))
    assert (grid.dequantize(codes)[:, dead] == 0).all()
    alone = moments_of(gram[np.ix_(live, live)], moments.outputs)
    np.testing.assert_array_equal(codes[:, live], kron(weight[:, live], grid, alone, damping=0.01 * len(live) / 32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_few_directions_of_outputs_matter(rank, dtype):
    """A singular H_O, in the precision in which gradients are summed."""
    random = np.random.default_rng(rank)
    weight = random.standard_normal((30, 24))
    slopes = random.standard_normal((rank, 30))
    moments = moments_of(correlated(random, 24).astype(dtype), (slopes.T @ slopes).astype(dtype))
    grid = search(weight, WeightFormat(3), moments)
    ours, columns = (loss(weight, grid, f(weight, grid, moments), moments) for f in (kron, gptq))
    assert ours < 0.1 * columns


def test_float32_costs_nothing():
    weight, grid, moments = problem(6, 48, 64, "w4")
    short = moments_of(moments.gram.astype(np.float32), moments.outputs.astype(np.float32))
    assert loss(weight, grid, kron(weight, grid, short), moments) < 1.02 * loss(
        weight, grid, kron(weight, grid, moments), moments
    )


def test_rounding_to_nearest_stays_where_it_loses_less():
    """Hardly anything in common: little to gain, and luck decides."""
    kept = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        weight = random.standard_normal((4, 6))
        inputs, outputs = (v @ v.T for v in (random.standard_normal((6, 90)), random.standard_normal((4, 60))))
        grid, moments = extremes(weight, WeightFormat(2)), moments_of(inputs, outputs)
        nearest, own = rtn(weight, grid), moments_of(damped(inputs, 0.01), damped(outputs, 0.05))
        raw = plain_loop(weight, grid, own.gram, own.outputs)
        kept.append(loss(weight, grid, raw, own) <= loss(weight, grid, nearest, own))
        np.testing.assert_array_equal(kron(weight, grid, moments), raw if kept[-1] else nearest)
    assert 0 < sum(kept) < len(kept)


def test_outputs_of_another_layer_are_refused():
    weight, grid, moments = problem(0, 8, 12)
    for wrong in (np.eye(12), np.ones((8, 12)), np.ones(8)):
        with pytest.raises(CalibrationError, match=r"of 8 outputs.*\[8,8\]") as told:
            kron(weight, grid, moments_of(moments.gram, wrong))
        assert str(list(wrong.shape)).replace(" ", "") in str(told.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    weight, grid, moments = problem(0, 8, 12)
    outputs = moments.outputs.copy()
    outputs[2, 5] = bad
    with pytest.raises(NumericsError, match="8 outputs"):
        kron(weight, grid, moments_of(moments.gram, outputs))


def test_it_does_not_run_uncalibrated():
    weight, grid, _ = problem(0, 8, 12)
    with pytest.raises(CalibrationError, match="calibrate first"):
        kron(weight, grid, None)


def test_a_weight_that_is_not_finite_is_refused():
    weight, grid, moments = problem(0, 8, 12)
    weight[3, 4] = np.nan
    with pytest.raises(NumericsError, match="NaN or infinite"):
        kron(weight, grid, moments)
