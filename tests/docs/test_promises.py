"""docs/promises.md names tests that there are; its commands are checked as those of every page."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "promises.md"
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_promise_an_answer_and_a_test():
    assert len(ROWS) > 50
    assert [row for row in ROWS if len(row) != 3 or not all(row)] == []


@pytest.mark.parametrize("name", sorted({name for row in ROWS for name in re.findall(r"`([^`]+)`", row[2])}))
def test_the_test_is_there(name):
    file, _, test = name.partition("::")
    assert (TESTS / file).is_file()
    assert not test or test in functions_of(TESTS / file)


def test_the_page_is_a_part_of_the_site():
    assert "promises.md" in (TESTS.parent / "mkdocs.yml").read_text()
