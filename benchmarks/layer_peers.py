"""llm-compressor's GPTQ on the layer that ``layer_methods.py`` has drawn: the public implementation to be no slower
than.

    python benchmarks/layer_methods.py --data layer
    OTHER/bin/python benchmarks/layer_peers.py layer/1536-inputs-2048-tokens --repeat 5

Runs in an environment of its own that has llmcompressor (0.14) and a CPU build of torch; mlxquant is not needed there.
Per-channel symmetric 4 bits, steps by its min-max observer, act-order, damping 0.01. Threads are OMP_NUM_THREADS. The
last line is one JSON object.
"""

import json
import logging
import time
import warnings
from pathlib import Path

import click
import numpy as np

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def relative_error(weight, inputs, quantized):
    output = inputs.astype(np.float64) @ weight.T.astype(np.float64)
    return float(
        np.linalg.norm(output - inputs.astype(np.float64) @ quantized.T.astype(np.float64)) / np.linalg.norm(output)
    )


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--repeat", default=5, show_default=True, type=click.IntRange(1), help="Time this many runs.")
def main(folder: Path, repeat: int) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, inputs, test = (np.load(folder / f"{name}.npy") for name in ("W", "X", "X_test"))
    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel", actorder="weight")
    tokens = torch.tensor(inputs)
    hessian = 2 * tokens.T @ tokens / len(tokens)
    seconds = []
    for _ in range(repeat):
        given, moments = torch.tensor(weight), hessian.clone()  # it works in place
        started = time.perf_counter()
        scale, zero = calculate_qparams(given.amin(1, keepdim=True), given.amax(1, keepdim=True), arguments)
        found = quantize_weight(given[None], moments[None], scale[None], zero[None], None, arguments)[0][0]
        seconds.append(time.perf_counter() - started)
    report = {
        "method": "llm-compressor gptq",
        "threads": torch.get_num_threads(),
        "seconds": float(np.median(seconds)),
        "seconds_least": min(seconds),
        "rel_error": relative_error(weight, inputs, found.numpy()),
        "rel_error_heldout": relative_error(weight, test, found.numpy()),
    }
    click.echo(json.dumps(report, sort_keys=True))


if __name__ == "__main__":
    main()
