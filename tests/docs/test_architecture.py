"""docs/architecture.md tells the folders as they are: their order, and each one's charter."""

import ast
import re
from pathlib import Path

import mlxquant

from support.layout import FOLDERS

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def charter(folder):
    """The first paragraph of a folder's docstring, as Markdown."""
    text = ast.get_docstring(ast.parse((Path(mlxquant.__file__).parent / folder / "__init__.py").read_text()))
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def test_the_page_has_every_folder_in_the_order_of_imports_with_its_charter():
    told = re.findall(r"^\| `(\w+)/` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert told == [(folder, charter(folder)) for folder in FOLDERS]
