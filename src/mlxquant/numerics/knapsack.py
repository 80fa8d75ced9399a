"""Which of its options every layer gets when all of them together may only be so large. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array


def least_cost(costs: Sequence[Array], sizes: Sequence[Array], capacity: float) -> list[int]:
    """One option for each item, with the least total cost whose total size is at most ``capacity``: a multiple-choice
    knapsack.

    ``costs[i]`` and ``sizes[i]`` [options of item i], float or int. Every item starts at its smallest option. Steps
    along the lower convex hulls of cost over size are taken in the order of what they save by size, as long as they
    fit: that is the optimum of the linear relaxation but for the one step that did not fit, so the total is at most
    what that step would have saved above the optimum (Sinha and Zoltners, doi:10.1287/opre.27.3.503). Then what room is
    left goes, one at a time, to the change that saves most. Ties go to the earlier item. Raises ValueError when the
    smallest options do not fit.
    """
    chosen = [_smallest(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    room = capacity - sum(size[at] for size, at in zip(sizes, chosen, strict=True))
    if room < 0:
        raise ValueError(f"the smallest options take {capacity - room:g}, more than {capacity:g}")
    hulls = [_hull_steps(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    for _, item, _, to in sorted(
        (-saved, item, order, to) for item, steps in enumerate(hulls) for order, (saved, to) in enumerate(steps)
    ):
        growth = sizes[item][to] - sizes[item][chosen[item]]
        if growth > room:
            break
        chosen[item], room = to, room - growth
    while (best := _best_change(costs, sizes, chosen, room)) is not None:
        item, to = best
        room -= sizes[item][to] - sizes[item][chosen[item]]
        chosen[item] = to
    return chosen


def _smallest(cost: Array, size: Array) -> int:
    """The option of the least size, and of those the one of the least cost."""
    return int(np.lexsort((cost, size))[0])


def _hull_steps(cost: Array, size: Array) -> list[tuple[float, int]]:
    """From the smallest option along the lower convex hull to the cheapest: what a step saves by size, descending, and
    where it leads.
    """
    here, steps = _smallest(cost, size), list[tuple[float, int]]()
    while (better := np.flatnonzero((cost < cost[here]) & (size > size[here]))).size:
        slopes = (cost[here] - cost[better]) / (size[better] - size[here])
        here = int(better[np.lexsort((cost[better], -slopes))[0]])
        steps.append((float(slopes.max()), here))
    return steps


def _best_change(
    costs: Sequence[Array], sizes: Sequence[Array], chosen: Sequence[int], room: float
) -> tuple[int, int] | None:
    """The item and its option that save most of all that fit; None when nothing saves anything."""
    best, most = None, 0.0
    for item, (cost, size, at) in enumerate(zip(costs, sizes, chosen, strict=True)):
        fitting = np.where(size - size[at] <= room, cost[at] - cost, -np.inf)
        if fitting.max() > most:
            best, most = (item, int(fitting.argmax())), float(fitting.max())
    return best


def shared_budget(
    errors: Sequence[Array], tiers: Sequence[Sequence[int]], shares: Sequence[float], average: float
) -> float:
    """The smallest budget at which the bits of inputs average at most ``average``.

    ``errors[i]`` [tiers,T_i] is the error of input i with each of ``tiers[i]`` bits, ascending, at each timestep. At
    each it takes the fewest bits whose error is at most ``budget * shares[i]``, the most where none's is
    (``methods.inputs.tiers.error``). The average is over timesteps and, by ``shares``, over inputs. Two bits more
    divide an error by about 16, so an error is about what they save: this is nearly the assignment of least total
    error, which takes bits wherever they save more than a common price. Raises ValueError when ``average`` cannot be
    met.
    """
    scaled = [error / share for error, share in zip(errors, shares, strict=True)]

    def fits(budget: float) -> bool:
        bits = [fewest_bits(error, some, budget).mean() for error, some in zip(scaled, tiers, strict=True)]
        return bool(np.average(bits, weights=shares) <= average * (1 + 1e-12))

    prices = np.unique(np.concatenate([np.zeros(1), *(error[:-1].ravel() for error in scaled)]))
    low, high = 0, len(prices) - 1
    if not fits(prices[high]):
        raise ValueError(f"an average of {average:g} bits is less than the fewest possible")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(prices[middle]) else (middle + 1, high)
    return float(prices[low])


def fewest_bits(errors: Array, tiers: Sequence[int], budget: float) -> Array:
    """The fewest of ``tiers``, ascending, whose error [tiers,T] is at most ``budget``, the most where none's is: bits
    [T].
    """
    within = errors <= budget
    within[-1] = True
    found: Array = np.asarray(tiers)[within.argmax(0)]
    return found
