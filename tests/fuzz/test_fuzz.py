"""A short campaign: a few mutations of each kind of file; ``benchmarks/fuzz.py`` is the long one."""

import json
from collections import Counter

import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files.checked import read_json, read_tensors

from fuzz import mutations
from fuzz.artifacts import ARTIFACTS, write_foreign, write_language, write_single
from fuzz.campaign import FAILED, LOADED, REFUSED, attempt_files, attempt_words, judged

SOME = ("language", "gpt", "trained", "spun", "module", "fake", "kept", "prompts", "text", "npz", "checkpoint")
SLOW = ("visualize npz", "load export")
QUICK = [artifact for artifact in ARTIFACTS if artifact.root in SOME and artifact.name not in SLOW]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    for write in (write_language, write_single, write_foreign):
        write(folder)
    return folder


def test_what_nobody_changed_loads(pristine):
    for artifact in QUICK:
        assert judged(lambda artifact=artifact: artifact.read(pristine / artifact.root)) == (LOADED, ""), artifact.name


@pytest.mark.parametrize("artifact", QUICK, ids=lambda artifact: artifact.name)
def test_changed_files_load_or_give_one_line(pristine, tmp_path, artifact):
    verdicts = Counter()
    for number in range(12):
        outcome = attempt_files(number, np.random.default_rng([1, number]), artifact, pristine, tmp_path / "files")
        assert outcome.verdict != FAILED, outcome
        verdicts[outcome.verdict] += 1
    assert verdicts[REFUSED]


def test_changed_recipes_are_read_or_give_one_line():
    outcomes = [attempt_words(number, np.random.default_rng([2, number])) for number in range(60)]
    assert not [outcome for outcome in outcomes if outcome.verdict == FAILED]
    assert {outcome.verdict for outcome in outcomes} == {LOADED, REFUSED}


def test_judges_see_tracebacks_and_long_messages():
    def fail(error):
        raise error

    assert judged(lambda: fail(RuntimeError("std::bad_cast")))[0] == FAILED
    assert judged(lambda: fail(ArtifactError("x" * 10**6)))[0] == REFUSED  # the class has made it short
    long = ArtifactError("")
    long.args = ("x" * 501,)
    assert judged(lambda: fail(long))[0] == FAILED
    two = ArtifactError("")
    two.args = ("a\nb",)
    assert judged(lambda: fail(two))[0] == FAILED


def test_checksums_are_made_right(pristine, tmp_path):
    """Else the campaign would only ask whether checksums are compared."""
    path = tmp_path / "a.safetensors"
    path.write_bytes((pristine / "module" / "module.safetensors").read_bytes())
    entries, data = mutations.split_tensors(path.read_bytes())
    data[:] = bytes(len(data))
    path.write_bytes(mutations.joined(entries, data))
    arrays, _ = read_tensors(path, "quantized-module")
    assert not any(value.any().item() for value in arrays.values())
    facts = json.loads((pristine / "language" / "model.json").read_text())
    (tmp_path / "model.json").write_bytes(mutations.signed({**facts, "more": 2**40}))
    assert read_json(tmp_path / "model.json", "quantized-model")["more"] == 2**40
    folder = tmp_path / "language"
    folder.mkdir()
    for file in (pristine / "language").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = mutations.digests(folder)
    weights = folder / "weights.safetensors"
    entries, data = mutations.split_tensors(weights.read_bytes())
    data[-8:] = bytes(8)
    weights.write_bytes(mutations.joined(entries, data))
    mutations.vouch(folder, before)
    files = read_json(folder / "model.json", "quantized-model")["files"]
    assert files["weights.safetensors"] == mutations.digests(folder)[weights] != before[weights]
