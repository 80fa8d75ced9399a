"""Mutation number k of a campaign: change something, read it, and judge what came of it.

Right are two things: it loads, or it is refused by one MlxQuantError of one line and at most 500 characters. Anything
else is a failure: another exception, a message that is longer, and, which whoever runs the campaign has to notice, a
process that dies, hangs or grows.
"""

import shutil
import traceback
import warnings
from dataclasses import asdict, dataclass

import numpy as np

from mlxquant.errors import LIMIT, MlxQuantError

from fuzz.artifacts import ARTIFACTS, NAMES, OVERRIDES, CommandError, read_recipe
from fuzz.mutations import change_file, change_words, digests, pick, vouch

LOADED, REFUSED, FAILED = "loaded", "refused", "failed"
WORDS = 0.15  # of the mutations, those of recipes and overrides
DEAR = (
    "report",
    "look at statistics",
    "visualize npz",
    "inspect activations",
    "weights",
    "inspect weights",
    "load export",
)  # fmt: skip; seconds each, so they are drawn less often
VOUCHED = 0.85  # of those of files, those whose checksums are made right afterwards


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: ``of`` what, ``done`` what to it, ``verdict``, and what was ``said``."""

    number: int
    of: str
    done: str
    verdict: str
    said: str = ""

    def to_dict(self):
        return asdict(self)


def attempt(number, seed, pristine, scratch):
    """Mutation ``number`` of the campaign ``seed``, of the files of ``write_all`` in ``pristine``, done in ``scratch``,
    which is emptied.
    """
    rng = np.random.default_rng([seed, number])
    if rng.random() < WORDS:
        return attempt_words(number, rng)
    names = list(dict.fromkeys(artifact.name for artifact in ARTIFACTS))
    name = pick(rng, names)
    if name in DEAR and rng.random() < 0.8:
        name = pick(rng, names)
    artifact = pick(rng, [artifact for artifact in ARTIFACTS if artifact.name == name])
    return attempt_files(number, rng, artifact, pristine, scratch)


def attempt_files(number, rng, artifact, pristine, scratch):
    """A mutation of one file of an artifact."""
    folder = scratch / artifact.root
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(pristine / artifact.root, folder)
    before = digests(folder)
    files = sorted(path for path in folder.glob(artifact.files) if path.is_file() and path.suffix != ".png")
    done = change_file(pick(rng, files), rng)
    if rng.random() < VOUCHED:
        vouch(folder, before)
    else:
        done += ", not vouched for"
    verdict, said = judged(lambda: artifact.read(folder))
    return Outcome(number, artifact.name, done, verdict, said)


def attempt_words(number, rng):
    name, overrides = pick(rng, NAMES), [pick(rng, OVERRIDES) for _ in range(int(rng.integers(0, 3)))]
    if rng.random() < 0.5 or not overrides:
        name = change_words(name, rng)
    else:
        overrides[0] = change_words(overrides[0], rng)
    verdict, said = judged(lambda: read_recipe(name, overrides))
    return Outcome(number, "recipe", repr((name, overrides))[:300], verdict, said)


def judged(read):
    """The verdict on reading something, and what was said: an error's message, or a failure's traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except (MlxQuantError, CommandError) as error:
        said = str(error)
        right = len(said) <= LIMIT and len(said.splitlines()) == 1
        return (REFUSED if right else FAILED), said if right else f"{len(said)} characters: {said[:2000]}"
    except Exception:
        return FAILED, traceback.format_exc(limit=-8)[-3000:]
    return LOADED, ""
