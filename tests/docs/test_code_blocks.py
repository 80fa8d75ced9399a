"""The documentation keeps its word: what its commands name exists, and the blocks of README and quick start run.

A block that cannot run here says why in the page, in a comment above it: ``<!-- not run: installs packages -->``.
"""

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import click
import mlx.core as mx
import pytest

from mlxquant.commandline import cli
from mlxquant.models.gpt.adapter import GPTAdapter
from mlxquant.models.shapes.adapter import MMDiTShapes

from support.command_line import succeed
from support.tiny_pictures import tiny_adapter

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [ROOT / "README.md", ROOT / "docs" / "quick-start.md"]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
SMALLER = {  # what blocks say, and what is run
    "prompts=16": "prompts=2",
    "steps=28": "steps=2",
    "--num-prompts 16": "--num-prompts 2",
    "--windows 256": "--windows 8",
}
HERE_DOCUMENT = re.compile(r"^(.*)<<'(\w+)'(.*)\n(?:.*\n)*?\2$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``reason`` says why it is not run."""

    name: str
    language: str
    text: str
    reason: str | None

    @property
    def commands(self):
        """What a shell would run, as lists of words; what a here-document holds is no command."""
        text = HERE_DOCUMENT.sub(r"\1\3", self.text.replace("\\\n", " "))
        for line in text.splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words


def blocks(page):
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(f"{page.name}:{line}", found["language"], found["text"], found["reason"])


def spoken(page):
    """Commands in the running text of a page, as lists of words; ``quantize --data FILE`` is one of mlxquant's."""
    for found in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text())):
        words = found.replace("…", "").split()
        if "mlxquant.VERB" in words:
            continue
        if len(words) > 1 and words[0] in cli.VERBS:
            words = ["mlxquant", *words]
        if words[:1] in (["mlxquant"], ["python"], ["conda"]) and len(words) > 1:
            yield shlex.split(" ".join(words))


def ours(words):
    """The click command that these words start and its arguments, or None where they start something else."""
    if words[:2] == ["conda", "run"]:
        words = words[4:]
    if words[0] == "mlxquant":
        command = cli.main.get_command(click.Context(cli.main), words[1])
        assert command is not None, f"mlxquant has no verb {words[1]}"
        return command, words[2:]
    if words[:2] == ["python", "-m"] and words[2].partition(".")[0] == "mlxquant":
        module = import_module(words[2])
        if hasattr(module, "__path__"):  # a package: what runs is in its __main__
            module = import_module(f"{words[2]}.__main__")
        return getattr(module, "command", None) or module.main, words[3:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_exist(page):
    for block in blocks(page):
        for words in block.commands if block.language == "sh" else ():
            if found := ours(words):
                command, arguments = found
                command.make_context(command.name, list(arguments))  # refuses unknown options and values
    for words in spoken(page):
        if found := ours(words):
            command, arguments = found
            with suppress(click.BadOptionUsage):  # in running text an option may come without its value
                command.make_parser(click.Context(command, **command.context_settings)).parse_args(list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_are_there(page):
    for path in re.findall(r"python ((?:benchmarks|demos|examples)/\w+\.py)", page.read_text()):
        assert (ROOT / path).exists(), path


def test_a_command_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="no verb quantise"):
        ours(["mlxquant", "quantise"])
    command, arguments = ours(["mlxquant", "quantize", "--bits", "4"])
    with pytest.raises(click.NoSuchOption):
        command.make_parser(click.Context(command)).parse_args(arguments)


def test_here_documents_and_comments_are_no_commands():
    text = "python - <<'EOF' > a.txt\nimport json\nEOF\nmlxquant methods --json \\\n  --verbose  # all\n"
    found = list(Block("", "sh", text, None).commands)
    assert found == [["python", "-", ">", "a.txt"], ["mlxquant", "methods", "--json", "--verbose"]]


@pytest.fixture
def small_models(monkeypatch):
    """The tiny model in place of ``mmdit-shapes``, with 2 prompts of its own and 2 steps, and ``gpt-python`` on 4
    windows of text; without MLX's compiler, which takes longer than all else here.
    """
    prompts = MMDiTShapes.prompts

    def few(model, purpose, count, seed=0):
        return prompts(model, purpose, min(count, 2), seed)

    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))
    monkeypatch.setattr(MMDiTShapes, "prompts", few)
    monkeypatch.setattr(MMDiTShapes, "steps", 2)
    monkeypatch.setattr(GPTAdapter, "samples", 4)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_blocks_run_in_order(page, small_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")
    there = [block for block in blocks(page) if block.reason is None]
    assert len(there) >= 3
    for block in there:
        run(smaller(block))


def smaller(block):
    """The block with little to do: contributing.md says what."""
    text = block.text
    for many, few in SMALLER.items():
        text = text.replace(many, few)
    return replace(block, text=text)


def run(block):
    if block.language == "python":
        exec(compile(block.text, block.name, "exec"), {})
        return
    for words in block.commands:
        assert words[0] == "mlxquant", f"{block.name}: {words[0]} is not run here; say why with <!-- not run: ... -->"
        succeed(*words[1:])


@pytest.mark.parametrize("block", [b for page in RUN for b in blocks(page) if b.reason], ids=lambda block: block.name)
def test_block_is_not_run(block):
    pytest.skip(f"{block.name}: {block.reason}")


def test_what_is_made_smaller_is_still_there():
    text = "".join(block.text for page in RUN for block in blocks(page))
    assert [many for many in SMALLER if many not in text] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
