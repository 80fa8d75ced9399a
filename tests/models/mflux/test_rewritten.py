"""Code of mflux runs with other numbers, and with its own again afterwards."""

from importlib import import_module

import pytest

from support.mflux_checkpoints import small_models
from support.mflux_models import mflux
from support.mflux_rewritten import rewritten

pytestmark = [pytest.mark.mflux, pytest.mark.slow]

ATTENTION = "mflux.models.flux.model.flux_transformer.joint_attention"


def test_mflux_is_itself_again_afterwards():
    attention = import_module(ATTENTION).JointAttention
    models = mflux("models.common.config.model_config.AVAILABLE_MODELS")
    before = attention.__init__.__code__, dict(vars(models["flux2-klein-4b"]))
    with small_models():
        assert attention().to_q.weight.shape == (128, 128)
        assert models["flux2-klein-4b"].transformer_overrides["num_layers"] == 2
    assert (attention.__init__.__code__, vars(models["flux2-klein-4b"])) == before


def test_a_number_that_mflux_does_not_have_is_an_error():
    attention = import_module(ATTENTION).JointAttention
    before = attention.__init__.__code__
    with (
        pytest.raises(AssertionError, match=r"joint_attention: found no \['3073'\]"),
        rewritten({ATTENTION: {"3073": "1"}}),
    ):
        pass
    assert attention.__init__.__code__ is before
