"""The trained weights, from the ONNX file in the package ``adaptive-terrain-diffusion``.

The file names the weights of convolutions and linears as the network does. Those of normalizations have no names there:
each normalization is followed by a product with a constant and a sum with another, and then comes the convolution which
it is for.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np

from terrain.network import Denoiser, UNet

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
FILE = "weights/terrain_consistency_unet_difficulty100.onnx"
NORMS = {
    "in_layers.2": "in_layers.0",
    "out_layers.3": "out_layers.0",
    "qkv": "norm",
    "out.2": "out.0",
}  # by their convolution


def installed_file():
    """Where the installed package has its weights; nothing of it is imported."""
    found = find_spec("terrain_diffusion")
    if found is None or found.origin is None:
        raise SystemExit(f"the weights come with a package that is not installed: pip install {PACKAGE} onnx")
    return Path(found.origin).parent / FILE


def read(file):
    """The parameters of ``Denoiser`` by name, float32, from an ONNX file."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(file).graph
    constants = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    found = {name: value for name, value in constants.items() if name.startswith("network.")}
    readers = {name: node for node in graph.node for name in node.input}
    norm = {}
    for node in graph.node:  # in the order of execution
        if node.op_type == "InstanceNormalization":
            product = readers[readers[node.output[0]].output[0]]  # with a reshaping between them
            total = readers[product.output[0]]
            norm = {"weight": constants[product.input[1]].ravel(), "bias": constants[total.input[1]].ravel()}
        elif node.op_type == "Conv" and norm:
            convolution = node.input[1].removesuffix(".weight")
            place = next(
                convolution.removesuffix(end) + name for end, name in NORMS.items() if convolution.endswith(end)
            )
            found |= {f"{place}.{name}": value for name, value in norm.items()}
            norm = {}
    return {
        in_mlx(name): mx.array(value.transpose(0, 2, 3, 1) if value.ndim == 4 else value)
        for name, value in found.items()
    }


def in_mlx(name):
    """The name of a parameter of ours: a block's layers are a list of its own."""
    return re.sub(r"^(network\.(?:(?:in|out)put_blocks\.\d+|middle_block))\.", r"\1.layers.", name)


def pretrained(file=None):
    """The trained model, from the installed package where no file is given."""
    model = Denoiser(UNet())
    model.load_weights(list(read(file or installed_file()).items()))
    mx.eval(model.parameters())
    return model


def write(model, file):
    """An ONNX file like the package's with the weights that a model has whose weights alone are quantized, in float32:
    for those who want to draw with the package's own generator.
    """
    import onnx
    from onnx.numpy_helper import from_array

    proto = onnx.load(installed_file())
    tensors = {in_mlx(tensor.name): tensor for tensor in proto.graph.initializer}
    for path, module in model.named_modules():
        if hasattr(module, "dequantized"):
            tensor, weight = tensors[f"{path}.weight"], np.array(module.dequantized())
            in_onnx = weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight
            tensor.CopyFrom(from_array(np.ascontiguousarray(in_onnx), tensor.name))
    onnx.save(proto, file)
