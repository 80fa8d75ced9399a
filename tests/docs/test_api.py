"""docs/api.md has every public name, and no other."""

import re
from pathlib import Path

import mlxquant as mq

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_has_every_public_name():
    assert sorted(re.findall(r"^::: mlxquant\.(\w+)$", PAGE.read_text(), re.MULTILINE)) == sorted(mq.__all__)
