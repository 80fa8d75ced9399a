"""Quantize a model that draws, see what it cost, and keep the result: the whole way in a page.

python examples/picture_model.py --out picture-model

Takes the small SD3-style model that ships with the package, quantizes it to 4-bit weights and 8-bit activations, once
by rounding and once calibrated, draws the same held-out prompts and seeds with all three, and writes comparison.png and
the calibrated model. Stable Diffusion 3 Medium goes the same way, with --model sd3-medium.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import mlxquant as mq


def main():
    parser = argparse.ArgumentParser(description="Quantize a model that draws, and compare.")
    parser.add_argument("--model", default="mmdit-shapes", help="name, hub id or folder [%(default)s]")
    parser.add_argument("--recipe", default="gptq-w4a8", help="beside plain rounding [%(default)s]")
    parser.add_argument("--prompts", type=int, default=8, help="to calibrate on [%(default)s]")
    parser.add_argument("--steps", type=int, help="of the sampler [the model's]")
    parser.add_argument("--evaluate", type=int, default=4, help="held-out prompts to draw [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("picture-model"), help="folder to write [%(default)s]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # What the layers see while pictures are drawn: the trajectories of some prompts. The model itself stays as it is.
    model = mq.load(args.model)
    calib = mq.calibrate(model, args.prompts, args.steps, progress=tqdm)
    rounded, calibrated = (mq.quantize(model, calib, recipe, progress=tqdm) for recipe in ("rtn-w4a8", args.recipe))

    # The same prompts and seeds with all three. These prompts were neither trained nor calibrated on.
    prompts = model.diffusion.prompts("evaluation", args.evaluate)
    compared = mq.compare(
        model, {"rounded": rounded, "calibrated": calibrated}, prompts, steps=args.steps, progress=tqdm
    )
    for name, quantized in (("rounded", rounded), ("calibrated", calibrated)):
        size = f"{quantized.size.model_bytes / 1e6:.2f} MB, {quantized.size.bits_per_weight:.2f} bits a weight"
        print(f"{name:<12}{compared.figures(name)}, {size}")
    print(compared.save(args.out / "comparison.png"))

    # A folder with the codes, packed, and a record of how they came about; it draws the same picture again.
    folder = calibrated.save(args.out / "model", force=True)
    drawn = [one.images(prompts[:1], args.steps) for one in (calibrated, mq.load(folder))]
    print(f"{folder}: loaded, it draws the same picture: {np.array_equal(*drawn)}")
    print(f"\nPapers to cite for {args.recipe}:\n{mq.citation(args.recipe)}")


if __name__ == "__main__":
    main()
