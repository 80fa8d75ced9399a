"""The tables of docs/results.md, made from the rows in benchmarks/results: ``python benchmarks/results_page.py``.

Writes each table between its marks in the page and leaves everything else as it is:

    <!-- generated: methods (python benchmarks/results_page.py) -->
    <!-- end -->

``methods`` has every row of which_method.jsonl, a table a format, ``real-models`` every row of real_models.jsonl,
``peers`` every row of language_peers.jsonl, a table a model, ``limits`` every row of limits.jsonl; ``language`` has the
rows that this file names. With ``--check`` nothing is written: where a table is not what the rows say, that is said in
one line, and the exit code is 1. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

import language
import language_peers
import limits
import real_models
import rows
import which_method
from mlxquant.commandline.console import result
from mlxquant.files.atomic import atomic_file

ROOT = Path(__file__).parents[1]
File = click.Path(path_type=Path, exists=True)
COMMAND = "python benchmarks/results_page.py"
OPENING, END = "<!-- generated: ", "<!-- end -->"
BLOCK = re.compile(rf"({OPENING}([\w-]+)[^\n]*-->\n)((?:(?!{OPENING}).)*?)({END})", re.DOTALL)

LANGUAGE = """
full precision
data-free w8a16
rtn-w4a16
gptq-w4a16
descent-w4a16
qronos-w4a16
spinquant+qronos-w4a16
rtn-w4a16-g64
gptq-w4a16-g64
gptq+unclipped-w4a16-g64
gptq+unclipped+corrected-w4a16-g64
rtn-w3a16
gptq-w3a16
gptq+corrected-w3a16
qronos-w3a16
descent-w3a16
spinquant+qronos-w3a16
rtn-w2a16-g64
gptq-w2a16-g64
gptq+unclipped-w2a16-g64
gptq+unclipped+corrected-w2a16-g64
qronos+unclipped-w2a16-g64
rtn-w4a8
gptq-w4a8
gptq-w4a8-token
gptq+rotation-w4a8-token
spinquant w4a8
gptq-w4a4
rtn-w4a4-token
gptq-w4a4-token
gptq+rotation-w4a4-token
hadamard w4a4
spinquant w4a4
spinquant w4a4, 400 steps
trained on
qat symmetric w8
qat symmetric w4
qat affine w4
qat stochastic w4
qat symmetric w3
qat symmetric w2
qat ternary
qat symmetric w4, activations 8
qat symmetric w4, activations 4 a token
""".strip().splitlines()


def rows_of(results: Path, benchmark: str, shown: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The figures of a benchmark's rows by name.

    ClickException when they are of two models or sizes, or when one of ``shown`` is missing.
    """
    file = results / f"{benchmark}{rows.SUFFIX}"
    found = rows.read(file)
    kinds = {str(row["of"]): row["of"] for row in found}
    if len(kinds) != 1:
        raise click.ClickException(f"{file}: rows of {' and '.join(kinds) or 'nothing'}, expected them to be of one")
    (of,) = kinds.values()
    figures = rows.Rows(file, **of).figures()
    if missing := [name for name in shown if name not in figures]:
        raise click.ClickException(f"{file}: no row {missing[0]!r}, which the page shows; measure it or show another")
    return figures


def methods(results: Path) -> str:
    found, _exact = which_method.measured(results / f"which_method{rows.SUFFIX}")
    return which_method.tables(which_method.summaries(found))


def language_models(results: Path) -> str:
    found = rows_of(results, "language", LANGUAGE)
    return language.table_of({name: language.summary(found[name], found["full precision"]) for name in LANGUAGE})


def others_models(results: Path) -> str:
    return real_models.tables(real_models.summaries(real_models.measured(results / f"real_models{rows.SUFFIX}")))


def peers(results: Path) -> str:
    return language_peers.tables(language_peers.measured(results / f"language_peers{rows.SUFFIX}"))


def rates(results: Path) -> str:
    return limits.tables(rows_of(results, "limits"))


TABLES: dict[str, Callable[[Path], str]] = {
    "methods": methods,
    "language": language_models,
    "peers": peers,
    "real-models": others_models,
    "limits": rates,
}


def filled(text: str, results: Path) -> tuple[str, list[str]]:
    """The page with its tables made anew, and the names of those that were stale; refuses marks that do not add up."""
    marked = [block[2] for block in BLOCK.finditer(text)]
    if sorted(marked) != sorted(TABLES) or text.count(OPENING) != len(marked):
        whole = f"found {text.count(OPENING)} opening marks, whole tables {', '.join(marked) or 'none'}"
        raise click.ClickException(f"{whole}; expected each of {', '.join(TABLES)} once, and {END} after it")
    stale = []

    def fill(block: re.Match[str]) -> str:
        opening, name, old, end = block.groups()
        new = f"\n{TABLES[name](results)}\n\n"  # blank lines, or Markdown takes the table for a part of the comment
        if old != new:
            stale.append(name)
        return opening + new + end

    return BLOCK.sub(fill, text), stale


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where a table is stale.")
@click.option("--page", type=File, default=ROOT / "docs" / "results.md", help="[default: docs/results.md]")
@click.option("--results", type=File, default=ROOT / "benchmarks" / "results", help="[default: benchmarks/results]")
def main(check: bool, page: Path, results: Path) -> None:
    text, stale = filled(page.read_text(encoding="utf-8"), results)
    if check and stale:
        raise click.ClickException(f"{page}: not what the rows say: {', '.join(stale)}; {COMMAND} mends it")
    if stale:
        with atomic_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    result({"tables": list(TABLES), "written": stale})


if __name__ == "__main__":
    main()
