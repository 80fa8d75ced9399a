"""A rounding method of one's own, registered from outside of the package, and what it is worth on pictures.

python examples/own_method.py

Prints, for 4-bit weights rounded to nearest, by this method and by GPTQ, how close pictures are to those of full
precision. Once this file is imported its method is one like any other: recipes can name it, principal+rotation-w4a8
say, and the law tests hold it to what every rounding method promises:

PYTHONPATH=examples python -m pytest -p own_method tests/laws -k principal

How one comes to such an idea is in write_a_method.ipynb, and docs/new-method.md has the way into the package, for
methods that others should have, too.
"""

import argparse

import numpy as np
from tqdm import tqdm

import mlxquant as mq
from mlxquant.methods.registry import register
from mlxquant.methods.weights.rtn import better_rows, rtn
from mlxquant.numerics.moments import calibrated_gram


@register("round", "principal", summary="codes turned around until errors cancel where inputs are largest")
def principal(weight, grid, moments):
    """Codes uint8 [out,in] for ``weight`` [out,in] on ``grid``; ``moments`` are those of the layer's inputs.

    The output error of a row is d H dᵀ, with d its rounding errors and H = ``moments.gram``. Errors along H's first
    eigenvector u cost most. So codes are turned around, rounded the other way, until u·d is nearly 0: first those that
    take the most from u·d for what they add on H's diagonal. A row that ends up worse than rounded to nearest is
    rounded to nearest.
    """
    gram = calibrated_gram(moments, weight.shape[1]).astype(np.float64)
    nearest = rtn(weight, grid)
    main = np.linalg.eigh(gram)[1][:, -1]
    step = grid.expand(grid.scales, weight.shape[1])
    errors = weight.astype(np.float64) - grid.dequantize(nearest)
    surplus, turn = errors @ main, np.sign(errors)
    gain = turn * step * main * np.sign(surplus)[:, None]
    able = (gain > 0) & (nearest + turn >= 0) & (nearest + turn < grid.format.levels)
    price = np.diagonal(gram) * step * (step - 2 * np.abs(errors))
    order = np.argsort(np.divide(price, gain, out=np.full(gain.shape, np.inf), where=able), axis=1, kind="stable")
    used = np.cumsum(np.take_along_axis(np.where(able, gain, 0), order, axis=1), axis=1)
    turned = np.take_along_axis(used <= np.abs(surplus)[:, None], np.argsort(order, axis=1), axis=1) & able
    codes = (nearest + turned * turn).astype(np.uint8)
    return better_rows(weight, grid, codes, nearest, gram)


def main():
    parser = argparse.ArgumentParser(description="A rounding method of one's own, beside nearest and GPTQ.")
    parser.add_argument("--prompts", type=int, default=4, help="to calibrate on [%(default)s]")
    parser.add_argument("--steps", type=int, help="of the sampler [the model's, 28]")
    parser.add_argument("--evaluate", type=int, default=4, help="held-out prompts to draw [%(default)s]")
    args = parser.parse_args()

    model = mq.load("mmdit-shapes")
    calib = mq.calibrate(model, args.prompts, args.steps, progress=tqdm)
    recipes = ["rtn+search-w4a16", "principal-w4a16", "gptq-w4a16"]  # on the same grids: only the codes differ
    models = {recipe: mq.quantize(model, calib, recipe, progress=tqdm) for recipe in recipes}
    prompts = model.diffusion.prompts("evaluation", args.evaluate)
    compared = mq.compare(model, models, prompts, steps=args.steps, progress=tqdm)
    for recipe, decibels in compared.psnr_db.items():
        print(f"{recipe:<18}{decibels.mean():6.2f} dB")


if __name__ == "__main__":
    main()
