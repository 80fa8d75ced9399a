"""Random vectors have, on average, the Hessian of the errors that predictions are judged by."""

from types import SimpleNamespace

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.objectives import BRANCH, EveryNumber, GuidedPrediction, NextToken

ALL = SimpleNamespace(judged=lambda signs: signs)


def hessian(errors, size, step=1.0):
    """Of a function of [size] numbers that is least, and zero, at zero, by central differences: [size,size]."""
    units = np.eye(size) * step

    def along(direction):
        return (errors(direction) + errors(-direction)) / (2 * step**2)

    single = [along(unit) for unit in units]
    return np.array([[along(units[i] + units[j]) - single[i] - single[j] for j in range(size)] for i in range(size)])


def second_moments(objective, prompted, shape, draws=40_000):
    """E[s sᵀ] of the vectors for so many samples of some numbers, all in one prediction."""
    drawn = objective.slopes({"v": mx.zeros((draws * shape[0], shape[1]))}, prompted * draws, 7)["v"]
    rows = np.array(drawn, np.float64).reshape(draws, -1)
    return rows.T @ rows / draws


def guided(weight, sides, adapter=ALL):
    prompted = {2: (True, False), 1: (weight == 1,)}[sides]
    return GuidedPrediction(adapter, float(weight), sides), prompted


@pytest.mark.parametrize(("weight", "sides"), [(0, 1), (1, 1), (2, 2), (5, 2), (0.5, 2)])
def test_guided_predictions(weight, sides):
    """Two pictures of two numbers: rows of a picture have what they count in the guided prediction, and a quarter each
    for itself.
    """
    objective, prompted = guided(weight, sides)
    rows = 2 * sides
    shares = np.array([weight, 1 - weight] if sides == 2 else [1.0])
    exact = {"v": mx.zeros((rows, 2))}

    def errors(change):
        return objective.errors({"v": mx.array(change.reshape(rows, 2), mx.float32)}, exact, prompted * 2).sum()

    one = np.outer(shares, shares) + BRANCH * np.eye(sides)
    analytic = np.kron(np.kron(np.eye(2), one), np.eye(2))  # pictures and numbers do not meet
    np.testing.assert_allclose(hessian(errors, 2 * rows), analytic, atol=1e-4)  # the mean of two numbers, twice
    found = second_moments(objective, prompted * 2, (rows, 2))
    assert np.abs(found - analytic).max() < 0.03 * np.diagonal(analytic).max()


@pytest.mark.parametrize("prompted", [True, False])
def test_rows_that_run_alone(prompted):
    """One row a batch: it counts what it has of the guided prediction by itself."""
    objective, exact = GuidedPrediction(ALL, 3.0, 1), {"v": mx.zeros((1, 2))}
    share = 3.0 if prompted else -2.0
    wrong = objective.errors({"v": mx.array([[1.0, 2.0]])}, exact, (prompted,))
    np.testing.assert_allclose(wrong, [(share**2 + BRANCH) * 2.5])
    found = second_moments(objective, (prompted,), (1, 2))
    np.testing.assert_allclose(found, (share**2 + BRANCH) * np.eye(2), atol=0.2)


def test_what_nobody_uses_of_a_prediction_does_not_count():
    """As the learned variance of some hosts."""
    half = mx.array([1.0, 0.0])
    objective, prompted = guided(2, 2, SimpleNamespace(judged=lambda signs: {k: v * half for k, v in signs.items()}))
    exact = {"v": mx.ones((2, 2))}
    drawn = np.array(objective.slopes(exact, prompted, 0)["v"])
    assert (drawn[:, 1] == 0).all()
    assert (drawn[:, 0] != 0).all()
    assert objective.errors({"v": exact["v"] + mx.array([0.0, 9.0])}, exact, prompted) == [0]


def test_rows_side_by_side_are_of_one_picture():
    """Errors of both sides that cancel in the guided prediction are left with their quarter; across pictures nothing
    cancels.
    """
    objective, prompted = guided(2, 2)
    exact = {"v": mx.zeros((4, 1))}

    def errors(*rows):
        return objective.errors({"v": mx.array(rows, mx.float32)[:, None]}, exact, prompted * 2)

    np.testing.assert_allclose(errors(1, 2, 0, 0), [BRANCH * 5, 0])
    np.testing.assert_allclose(errors(1, 0, 0, 2), [4 + BRANCH, 4 + BRANCH * 4])
    drawn = np.array(objective.slopes({"v": mx.zeros((4, 999))}, prompted * 2, 1)["v"])
    signs = np.corrcoef(drawn)
    assert signs[0, 1] < -0.7
    assert signs[2, 3] < -0.7
    assert np.abs(signs[:2, 2:]).max() < 0.15


def test_seeds_draw_other_vectors_and_the_same_again():
    objective, prompted = guided(2, 2)
    one, again, other = (
        np.array(objective.slopes({"v": mx.zeros((2, 50))}, prompted, seed)["v"]) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


LOGITS = np.array([[0.3, -1.0, 2.0, 0.0], [-2.0, 0.5, 0.4, 1.5]])


def test_the_next_token():
    """Fisher's information diag(p) - p pᵀ is the Hessian of the divergence at the exact logits; tokens do not meet."""
    exact = {"logits": mx.array(LOGITS[None], mx.float32)}
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    fisher = np.zeros((8, 8))
    for token in range(2):
        here = slice(4 * token, 4 * token + 4)
        fisher[here, here] = np.diag(p[token]) - np.outer(p[token], p[token])

    def divergence(change):
        theirs = LOGITS + change.reshape(2, 4)
        return float((p * (np.log(p) - np.log(np.exp(theirs) / np.exp(theirs).sum(1, keepdims=True)))).sum(1).mean())

    np.testing.assert_allclose(2 * hessian(divergence, 8, 1e-3), fisher, atol=1e-4)  # the mean of two tokens
    change = np.random.default_rng(0).normal(size=(1, 2, 4))
    ours = NextToken().errors({"logits": exact["logits"] + mx.array(change, mx.float32)}, exact, (True,))
    np.testing.assert_allclose(ours, [divergence(change)], rtol=1e-4)
    assert abs(NextToken().errors(exact, exact, (True,))[0]) < 1e-6

    many = {"logits": mx.broadcast_to(exact["logits"], (20_000, 2, 4))}
    rows = np.array(NextToken().slopes(many, (True,) * 20_000, 5)["logits"], np.float64).reshape(-1, 8)
    np.testing.assert_allclose(rows.reshape(-1, 2, 4).sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(rows.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(rows.T @ rows / len(rows), fisher, atol=0.015)
    half = {"logits": exact["logits"].astype(mx.float16)}
    assert NextToken().slopes(half, (True,), 0)["logits"].dtype == mx.float32


def test_divergences_are_by_window():
    exact = {"logits": mx.array(np.stack([LOGITS, LOGITS]), mx.float32)}
    wrong = {"logits": exact["logits"] + mx.array([[[0.0] * 4] * 2, [[1.0, 0, 0, 0]] * 2])}
    first, second = NextToken().errors(wrong, exact, (True, True))
    assert abs(first) < 1e-6
    assert second > 0.03


def test_every_number_relative_to_what_is_predicted():
    """Of two arrays: errors are shares of the signal of both, and so are vectors."""
    exact = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}

    def errors(change):
        moved = {"a": exact["a"] + mx.array(change[:2], mx.float32), "b": exact["b"] + float(change[2])}
        return EveryNumber().errors(moved, exact, (True,))[0]

    np.testing.assert_allclose(hessian(errors, 3) / 2, np.eye(3) / 25, atol=1e-6)

    def draw(seed):
        drawn = EveryNumber().slopes(exact, (True,), seed)
        return np.concatenate([np.array(drawn["a"]), np.array(drawn["b"])[0]])

    rows = np.stack([draw(seed) for seed in range(1000)])
    found = rows.T @ rows / len(rows)
    np.testing.assert_allclose(found, np.eye(3) / 25, atol=0.12 / 25)


def test_nothing_predicted_is_no_reason_to_divide_by_it():
    exact = {"a": mx.zeros((2,))}
    assert EveryNumber().errors({"a": mx.array([3.0, 4.0])}, exact, (True,)) == [25]
    assert np.isfinite(np.array(EveryNumber().slopes(exact, (True,), 0)["a"])).all()
