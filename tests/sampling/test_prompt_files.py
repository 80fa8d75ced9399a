"""The shipped prompts for Stable-Diffusion-3-class models: enough, varied, balanced from the first line, disjoint."""

import itertools
import re
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from mlxquant.sampling.prompts import read_prompts

FOLDER = Path(__file__).parents[2] / "calibration"
NAMES = ("calibration", "evaluation")
LEAST = {"calibration": 128, "evaluation": 288}
FIRST_SEED = {"calibration": 1000, "evaluation": 20000}
RUN = 16  # prompts that hold every category once
FILLERS = frozenset(
    (
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "the",
        "to",
        "with",
    )
)
NUMBERS = r"two|three|four|five|six|seven|eight|nine|ten|dozen"
COLOURS = (
    r"black|white|grey|red|orange|yellow|green|blue|teal|turquoise|purple|violet|magenta|pink|brown|gold|golden|silver"
    r"|crimson|indigo|navy"
)
PLACES = (
    r"left|right|behind|in front of|above|below|under|underneath|on top|beside|next to|between|inside|across|foot"
    r" of|riding on"
)
PEOPLE = (
    r"man|woman|men|women|boy|girl|child|children|toddlers?|teenage|grandmother|couple|baby|person|students|player"
    r"|nurse|chef|potter|hunter|firefighter|surgeon|shepherd|beekeeper|calligrapher|schoolboy"
)
MEDIA = (
    r"painting|watercolour|drawing|render|model|print|poster|pixel|photograph|sketch|woodcut|illustration|pastel|engraving|gouache|etching"
    r"|stained-glass|picture"
)
DISTANCES = r"macro|close-up|close view|wide shot|wide view|wide picture|wide aerial|aerial wide|aerial|panoramic"
TAG_SOUP = (
    r"\d+k\b|masterpiece|best quality|highly detailed|ultra|hyper-?realistic|trending|award|hdr|unreal"
    r" engine|artstation|in the style of"
)


def load(name):
    with as_file(files("mlxquant.assets") / f"{name}.txt") as path:
        return read_prompts(path)


def texts(name):
    return [p.text for p in load(name)]


def words(text):
    """The words of a prompt, lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.casefold())


def matching(prompts, pattern):
    """The prompts in which whole words match the pattern, in any case."""
    return [t for t in prompts if re.search(rf"\b(?:{pattern})\b", t, re.IGNORECASE)]


def overlap(first, second):
    """Shared share (Jaccard) of the words that carry meaning, 0 to 1."""
    a, b = (set(words(t)) - FILLERS for t in (first, second))
    return len(a & b) / len(a | b)


def colour_bound(prompts):
    """The prompts with at least two different colours."""
    return [t for t in prompts if len(set(re.findall(rf"\b(?:{COLOURS})\b", t.casefold()))) >= 2]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_prompts_with_consecutive_seeds(name):
    prompts = load(name)
    assert len(prompts) >= LEAST[name]
    assert len(prompts) % RUN == 0
    assert [p.seed for p in prompts] == list(range(FIRST_SEED[name], FIRST_SEED[name] + len(prompts)))


def test_no_seed_is_shared():
    calibration, evaluation = ({p.seed for p in load(name)} for name in NAMES)
    assert not calibration & evaluation


def test_no_prompt_says_what_another_says():
    every = texts("calibration") + texts("evaluation")
    assert len({" ".join(words(t)) for t in every}) == len(every)
    assert [pair for pair in itertools.combinations(every, 2) if overlap(*pair) > 0.4] == []


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("A red fox asleep in snow", "a red fox, asleep on the snow!", True),
        ("A red fox asleep in fresh snow", "A red fox curled up asleep in snow", True),
        ("A red fox asleep in snow", "A blue boat on a lake", False),
    ],
)
def test_overlap_sees_near_duplicates(first, second, alike):
    assert (overlap(first, second) > 0.4) is alike


@pytest.mark.parametrize("name", NAMES)
def test_text_is_clean(name):
    prompts = texts(name)
    assert [t for t in prompts if t != " ".join(t.split())] == []
    assert matching(prompts, TAG_SOUP) == []
    assert [t for t in prompts if t.count('"') % 2] == []
    assert len({" ".join(words(t)[:3]) for t in prompts}) > 0.9 * len(prompts), (
        "too many prompts open with the same words"
    )


@pytest.mark.parametrize("name", NAMES)
def test_header_names_purpose_and_licence(name):
    header = [
        line
        for line in (files("mlxquant.assets") / f"{name}.txt").read_text("utf-8").splitlines()
        if line.startswith("#")
    ]
    assert header[0].startswith(f"# {name.capitalize()} prompts")
    assert "MIT License" in header[-1]


@pytest.mark.parametrize("name", NAMES)
def test_lengths_range_from_three_words_to_sixty(name):
    lengths = [len(t.split()) for t in texts(name)]
    for shortest, longest, least in (
        (3, 3, 1 / 16),
        (4, 9, 1 / 8),
        (10, 19, 1 / 4),
        (20, 39, 1 / 16),
        (40, 59, 1 / 50),
        (60, 90, 1 / 16),
    ):
        share = sum(shortest <= n <= longest for n in lengths) / len(lengths)
        assert share >= least, f"{share:.3f} of the prompts have {shortest} to {longest} words"
    assert min(lengths) == 3
    assert max(lengths) <= 90


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_is_short_and_quoted(name):
    quoted = [q for t in texts(name) for q in re.findall(r'"([^"]+)"', t)]
    assert len(quoted) >= len(texts(name)) / RUN
    assert all(len(q.split()) <= 4 for q in quoted)
    assert len(set(quoted)) == len(quoted)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_up_to_ten_is_counted(name):
    prompts = texts(name)
    assert {n for n in NUMBERS.split("|") if not matching(prompts, n)} == set()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "style",
    [
        "photograph",
        "oil painting|oil sketch",
        "watercolour",
        "line drawing",
        "3D render",
        "pixel art",
        "isometric",
        "woodcut|linocut|woodblock",
        "ink",
        "macro",
        "wide shot",
        "aerial|from the air|from above",
    ],
)
def test_styles_and_distances_are_covered(name, style):
    assert matching(texts(name), style)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "pattern",
    ["night", "rain|rainy|rainstorm", "snow", "fog|mist|misty", "city|street|skyline", "kitchen|room|interior"],
)
def test_scenes_are_covered(name, pattern):
    assert matching(texts(name), pattern)


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_sixteen_is_a_sample_of_all(name):
    prompts = texts(name)
    for start in range(0, len(prompts), RUN):
        run = prompts[start : start + RUN]
        lengths = [len(t.split()) for t in run]
        assert min(lengths) == 3, start
        assert max(lengths) >= 60, start
        assert colour_bound(run), start
        assert any(re.search(r'"[^"]+"', t) for t in run), start
        for pattern in (NUMBERS, PLACES, PEOPLE, MEDIA, DISTANCES):
            assert matching(run, pattern), (start, pattern)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_shows_the_packaged_file(name):
    link = FOLDER / f"{name}.txt"
    assert link.is_symlink()
    assert link.readlink() == Path("..", "src", "mlxquant", "assets", f"{name}.txt")
    assert read_prompts(link) == load(name)
