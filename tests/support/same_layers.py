"""Quantized layers that have to be equal, whoever made them."""

import numpy as np

from mlxquant.layers.tree import parameters


def assert_same(wanted, found):
    """The same paths, and at each the same codes, facts and parameters.

    Args:
        wanted: Layers by path.
        found: Layers by path.
    """
    assert wanted.keys() == found.keys()
    for path, layer in wanted.items():
        np.testing.assert_array_equal(layer.codes(), found[path].codes(), err_msg=path)
        assert layer.facts == found[path].facts
        for name, value in parameters(layer).items():
            np.testing.assert_array_equal(np.array(value), np.array(parameters(found[path])[name]), err_msg=path)
