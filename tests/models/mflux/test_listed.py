"""Every model that mflux lists: which of them are taken, and that the page says so."""

import re
from pathlib import Path

import pytest

from mlxquant.errors import AdapterError
from mlxquant.models.mflux.names import MfluxName, from_mflux

from support.mflux_checkpoints import CHECKPOINTS, FAMILIES

pytestmark = pytest.mark.mflux
PAGE = Path(__file__).parents[3] / "docs" / "mflux.md"


def listed():
    return from_mflux("models.common.config.model_config.AVAILABLE_MODELS")


def refusal(key):
    """Why a model is not taken; empty where it is."""
    try:
        MfluxName.of(f"mflux:{key}")
    except AdapterError as error:
        return str(error)
    return ""


def row(key):
    kind = from_mflux("models.common.cli.save.MODEL_CLASSES").get(key)
    why = refusal(key)
    taken = "no: draws from images" if "draws from" in why else "no: mflux cannot save it" if why else "yes"
    small = "quantized" if key in FAMILIES else "drawn" if key in CHECKPOINTS else ""
    return f"| `{key}` | {kind.__name__ if kind else ''} | {taken} | {small} |"


def test_the_page_lists_them_all():
    told = re.findall(r"^\| `[^`]+` \| \w* \| (?:yes|no).*$", PAGE.read_text(), re.MULTILINE)
    assert told == [row(key) for key in sorted(listed())]


def test_what_is_not_taken_is_refused_by_name():
    why = {key: found for key in listed() if (found := refusal(key))}
    assert len(why) == 19
    for key, words in why.items():
        assert words.startswith(f"mflux:{key} ")
        assert "record its own pipeline with mq.recording" in words or "cannot be written as a folder: " in words
    assert "draws from image_paths, and this draws from prompts alone" in why["qwen-image-edit"]
    assert "an image that controls it" in why["qwen-image-2.1-controlnet-union"]


def test_of_every_pipeline_that_is_taken_one_model_is_quantized_in_tests():
    classes = from_mflux("models.common.cli.save.MODEL_CLASSES")
    assert {classes[key] for key in listed() if not refusal(key)} == {
        classes[CHECKPOINTS[key].name] for key in FAMILIES
    }
