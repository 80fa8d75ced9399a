"""Somebody else's diffusion model: record it in its own pipeline, quantize it, and compare what it draws.

python examples/terrain_unet.py --out terrain

Needs pip install 'mlxquant[onnx]', which brings a UNet that others trained (terrain/__init__.py says who): noise and
a difficulty to a height map. terrain/network.py has it in MLX. The script records it while it draws, quantizes it
twice, calibrated and rounded to nearest, and prints how far the maps are from those of full precision. It writes
the maps side by side, heights.png, and the calibrated weights.
"""

import argparse
from pathlib import Path

import mlxquant as mq  # before mlx: on Linux it brings MLX a fast BLAS

# isort: split
import numpy as np
from PIL import Image

from terrain.heights import drawn, metres
from terrain.network import Denoiser, UNet
from terrain.weights import pretrained

CALIBRATED = 1000  # the first seed of calibration; the maps that are compared have other seeds
METHODS = ("rtn", "gptq+unclipped")


def asked(count):
    """As many difficulties, from flat to steep."""
    return np.rint(np.linspace(1, 100, count)).astype(int).tolist()


def main():
    parser = argparse.ArgumentParser(description="Quantize somebody else's diffusion model.")
    parser.add_argument("--format", default="w4a16", help="a weight format of recipes [%(default)s]")
    parser.add_argument("--calibrate", type=int, default=8, help="maps to calibrate on [%(default)s]")
    parser.add_argument("--maps", type=int, default=4, help="maps to compare [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("terrain"), help="folder to write [%(default)s]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    wanted = list(enumerate(asked(args.maps)))
    exact = pretrained()
    rows = [np.stack([metres(drawn(exact, seed, difficulty)) for seed, difficulty in wanted])]
    for method in METHODS:
        model = pretrained()
        with mq.recording(model.network) as seen:
            for number, difficulty in enumerate(asked(args.calibrate)):
                drawn(model, CALIBRATED + number, difficulty)
        report = mq.quantize_module(model.network, seen, f"{method}-{args.format}")
        rows.append(np.stack([metres(drawn(model, seed, difficulty)) for seed, difficulty in wanted]))
        noise = np.mean((rows[-1] - rows[0]) ** 2, (1, 2))
        decibels = 20 * np.log10(np.ptp(rows[0], (1, 2))) - 10 * np.log10(noise)
        print(
            f"{report.recipe}: {report.sizes.ratio:.2f} times smaller, {decibels.mean():.1f} dB against full precision"
        )
    print(f"\n{report}\n")
    file = mq.save_module(model, args.out / f"{report.recipe}.safetensors")
    loaded = mq.load_module(Denoiser(UNet()), file)
    same = np.array_equal(metres(drawn(loaded, *wanted[0])), rows[-1][0])
    print(f"{file}: loaded, it draws the same: {same}")
    sheet = np.concatenate([np.concatenate(list(row / np.ptp(rows[0], (1, 2), keepdims=True)), axis=1) for row in rows])
    Image.fromarray(np.rint(np.clip(sheet, 0, 1) * 255).astype(np.uint8)).save(args.out / "heights.png")


if __name__ == "__main__":
    main()
