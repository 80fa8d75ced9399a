"""What ``mlxquant --help`` shows, and what it does not import."""

import subprocess
import sys

import click
import pytest

from mlxquant.commandline import cli

from support.command_line import run


def shown():
    """The lines of the help as they stand, by the title above them."""
    sections, title = {}, None
    for line in run("--help").stdout.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
        elif title in cli.GROUPS and line.strip():
            sections.setdefault(title, []).append(line.split(maxsplit=1))
    return sections


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_line_is_what_the_verb_says_of_itself(verb):
    command = cli.main.get_command(click.Context(cli.main), verb)
    assert command.get_short_help_str(limit=200) == cli.VERBS[verb]


def test_verbs_stand_in_groups_and_each_on_one_line():
    assert shown() == {title: [list(row) for row in verbs.items()] for title, verbs in cli.GROUPS.items()}
    assert len(cli.VERBS) == sum(map(len, cli.GROUPS.values())) == 23


@pytest.mark.parametrize("code", ["import mlxquant", "from mlxquant.commandline.cli import main; main(['--help'])"])
def test_help_costs_no_array_library(code):
    """They and the models behind the verbs take ten times as long as the help."""
    heavy = ("mlx", "numpy", "matplotlib", "PIL", "tqdm")
    script = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules], [m for m in sys.modules if m.startswith("mlxquant.")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = ["mlxquant._interrupt", "mlxquant._blas"]
    if "cli" in code:
        ours += [f"mlxquant.{name}" for name in ("commandline", "errors", "commandline.usage", "commandline.cli")]
    assert done.stdout.splitlines()[-1] == f"[] {ours}"
