"""The names of a quantized module's parameters, which are the format of our files.

This is the only place that spells them. Who has a layer asks its methods; who has only a file takes the names from
here.
"""

from __future__ import annotations

import mlx.core as mx

WEIGHT, SCALES, BIASES = INTEGERS = ("weight", "scales", "biases")  # codes; what they are multiplied by, what is added
BIAS = "bias"
UP, DOWN = BRANCH = ("low_up", "low_down")
DIVISOR = "act_divisor"
TABLE = {  # in the order of ActivationTable's fields
    "act_sigma": mx.float32,
    "act_step": mx.float32,
    "act_shift": mx.float32,
    "act_bits": mx.uint8,
    "act_log": mx.uint8,
}
SIGMA, STEP, SHIFT, BITS, LOG = TABLE
NETWORK = "act_network"  # the numbers of the network over time that the table was made of
TOKEN = "act_token"
FOR_WEIGHT = (*INTEGERS, *BRANCH)  # what is stored for a weight's numbers
FOR_INPUT = (*TABLE, NETWORK, TOKEN)  # what says how an input is quantized
