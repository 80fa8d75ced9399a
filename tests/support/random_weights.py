"""Tensors for a network that nobody trained, scaled so that its activations neither vanish nor explode."""

import numpy as np


def random_tensors(shapes, seed=0):
    """Name to float32 array; variances are positive, norms near 1, and LPIPS' heads positive as the learned
    ones are.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape)
        if name.endswith("running_var"):
            value = 0.5 + np.abs(value)
        elif "norm" in name or name.endswith("bn.weight"):
            value = (1 if name.endswith("weight") else 0) + 0.1 * value
        elif name.startswith("lin"):
            value = np.abs(value)
        elif len(shape) > 1:
            value = value * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = 0.1 * value
        found[name] = value.astype(np.float32)
    return found
