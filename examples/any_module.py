"""Quantize the weights of a module of one's own, in place and without data: linears, convolutions and embeddings.

python examples/any_module.py --out any-module

The module is a small decoder, defined here and trained here in seconds, that draws a digit from its number. The script
then quantizes it at 8, 4, 3 and 2 bits, prints what is lost, writes digits.png, a row for full precision and one for
each format, and the 4-bit module as a file that loads into a fresh module. For models that mlxquant knows, calibration
does better: the other examples.
"""

import argparse
from pathlib import Path

import mlxquant as mq  # before mlx: on Linux it brings MLX a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32  # pixels
FORMATS = ("w8a16", "w4a16", "w3a16", "w2a16")  # weights alone, a step for every output


class DigitDecoder(nn.Module):
    """Digits [B] to grey pictures [B,32,32] in [0,1]."""

    def __init__(self):
        super().__init__()
        self.digit = nn.Embedding(10, 64)
        self.hidden = nn.Linear(64, 256)
        self.grow = nn.Linear(256, 16 * 16 * 4)
        self.smooth = nn.Conv2d(4, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def __call__(self, digits):
        x = self.grow(nn.relu(self.hidden(self.digit(digits)))).reshape(-1, 16, 16, 4)
        x = self.head(nn.relu(self.smooth(nn.relu(x)))).reshape(-1, 16, 16, 2, 2)  # each place becomes 2×2 pixels
        return mx.sigmoid(x.transpose(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE))


def drawn_digits():
    """The ten digits in Pillow's own font: float32 [10,32,32] in [0,1]."""
    pages = [Image.new("L", (SIDE, SIDE)) for _ in range(10)]
    for digit, page in enumerate(pages):
        ImageDraw.Draw(page).text((SIDE / 2, SIDE / 2), str(digit), 255, ImageFont.load_default(30), anchor="mm")
    return mx.array(np.stack(pages) / np.float32(255))


def trained(iterations, seed=0):
    """A decoder that has learned the digits."""
    mx.random.seed(seed)
    model, targets, digits = DigitDecoder(), drawn_digits(), mx.arange(10)
    optimizer = optim.Adam(1e-3)
    step = nn.value_and_grad(model, lambda: nn.losses.mse_loss(model(digits), targets))
    for _ in range(iterations):
        loss, gradients = step()
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    print(f"trained for {iterations} iterations, loss {loss.item():.4f}\n")
    return model


def main():
    parser = argparse.ArgumentParser(description="Quantize the weights of a module of one's own.")
    parser.add_argument("--iterations", type=int, default=300, help="of training [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("any-module"), help="folder to write [%(default)s]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model, digits = trained(args.iterations), mx.arange(10)
    weights = mq.save_module(model, args.out / "full.safetensors")
    rows = [np.array(model(digits))]
    for name in FORMATS:
        quantized = mq.load_module(DigitDecoder(), weights)
        # The last layer has few weights, and its errors go straight into the picture: it stays as it is.
        report = mq.quantize_linears(quantized, name, embeddings=True, exclude=["head"], steps="mse")
        rows.append(np.array(quantized(digits)))
        noise = np.mean((rows[-1] - rows[0]) ** 2)
        print(f"{name}: {report.ratio:.2f} times smaller, {-10 * np.log10(noise):.1f} dB against full precision")
        if name == "w4a16":
            print(f"\n{report}\n")
            file = mq.save_module(quantized, args.out / "digits-w4.safetensors")
            loaded = mq.load_module(DigitDecoder(), file)
            print(f"{file}: loaded, it draws the same: {np.array_equal(np.array(loaded(digits)), rows[-1])}\n")
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(np.rint(sheet * 255).astype(np.uint8)).resize((1280, 640), Image.Resampling.NEAREST).save(
        args.out / "digits.png"
    )


if __name__ == "__main__":
    main()
