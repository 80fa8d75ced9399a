"""Quantize a language model to 4-bit weights that stock mlx-lm loads, and measure what it lost.

python examples/language_model.py --out language-model

Takes the small GPT that ships with the package, which reads Python, byte by byte. It is calibrated on the sources of
Python's standard library and judged on mlxquant's own, which it has never seen, in bits per character: fewer are
better. With mlx-lm installed any of its models goes the same way (--model FOLDER or a hub id), with --calibrate and
--judge to name texts that suit it.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

import mlxquant as mq

RECIPES = ("rtn-w4a16-g64", "gptq+unclipped-w4a16-g64")  # groups of 64 inputs share a scale, as mlx-lm has it


def own_sources():
    """The text of this package."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(mq.__file__).parent.rglob("*.py")))


def main():
    parser = argparse.ArgumentParser(description="Quantize a language model and measure what it lost.")
    parser.add_argument("--model", default="gpt-python", help="name, hub id or folder [%(default)s]")
    parser.add_argument("--calibrate", type=Path, help="text file to calibrate on [Python's standard library]")
    parser.add_argument("--judge", type=Path, help="text file to be judged on [mlxquant's sources]")
    parser.add_argument("--samples", type=int, default=32, help="windows of text to calibrate on [%(default)s]")
    parser.add_argument("--windows", type=int, default=64, help="windows of text to be judged on [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("language-model"), help="folder to write [%(default)s]")
    args = parser.parse_args()

    model = mq.load(args.model)
    text = args.judge.read_text(encoding="utf-8") if args.judge else own_sources()
    full = model.predict(text, limit=args.windows, progress=tqdm).bits_per_character
    print(f"{'full precision':<26}{full:.4f} bits a character")

    calib = mq.calibrate_text(model, args.calibrate, args.samples)
    for recipe in RECIPES:
        quantized = mq.quantize(model, calib, recipe, progress=tqdm)
        lost = quantized.predict(text, limit=args.windows, progress=tqdm).bits_per_character - full
        print(f"{recipe:<26}{lost:+.4f} bits a character, {quantized.size.model_bytes / 1e6:.2f} MB")

    # The last one, as the folder that mlx-lm itself writes and reads.
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "mlx-lm"
    mq.export(quantized, folder, "mlx-lm", force=True)
    print(f'{folder}: python -m mlx_lm generate --model {folder} --prompt "def "')


if __name__ == "__main__":
    main()
