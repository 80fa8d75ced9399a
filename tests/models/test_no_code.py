"""A model is data: what its files ask to run is not run, whatever mlx-lm would do, and is not even downloaded."""

import json
import sys
import types

import pytest

from mlxquant.api.loading import load
from mlxquant.errors import ArtifactError
from mlxquant.models import mlx_lm

from support.hub_stand_in import repositories

CODE = "from pathlib import Path\nPath(__file__).with_name('marker').write_text('ran')\n"


@pytest.fixture
def imported(monkeypatch):
    """An mlx-lm that imports what it finds, as releases before 0.32 do; the folders that it was given."""
    given = []

    def run(folder, **options):
        given.append(folder)
        for path in mlx_lm.Path(folder).glob("*.py"):
            exec(compile(path.read_text(), str(path), "exec"), {"__file__": str(path)})
        raise ValueError("no weights")

    monkeypatch.setattr(mlx_lm, "mlx_lm_utils", lambda: types.SimpleNamespace(load=run, load_tokenizer=run))
    return given


def write(folder, config=None, tokenizer=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **(config or {})}))
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "code.py").write_text(CODE)
    return folder


CASES = [
    ({"config": {"model_file": "code.py"}}, "config.json: model_file asks to run Python code .*'code.py'"),
    ({"config": {"model_file": ["code.py"] * 10**5}}, "model_file asks to run"),
    ({"tokenizer": {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}}, "tokenizer_config.json: auto_map asks"),
]


def test_the_stand_in_runs_code(tmp_path, imported):
    with pytest.raises(ArtifactError, match="mlx-lm cannot load it"):
        load(write(tmp_path / "model"))
    assert (tmp_path / "model" / "marker").exists()


@pytest.mark.parametrize(("files", "message"), CASES)
def test_code_is_refused_before_mlx_lm_sees_it(tmp_path, imported, files, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        load(write(tmp_path / "model", **files))
    assert len(str(caught.value)) <= 500
    assert not imported
    assert not (tmp_path / "model" / "marker").exists()


def test_a_hub_id_brings_no_code(monkeypatch, tmp_path, imported):
    repositories(monkeypatch, tmp_path, {"someone/net": {"config.json": {"model_type": "gpt2"}}})
    asked = {}

    def snapshot(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(write(tmp_path / "snapshot", {"model_file": "code.py"}))

    sys.modules["huggingface_hub"].snapshot_download = snapshot
    with pytest.raises(ArtifactError, match="model_file asks to run"):
        load("someone/net")
    assert not imported
    assert not (tmp_path / "snapshot" / "marker").exists()
    (patterns,) = asked.values()
    assert not any(pattern.endswith("py") for pattern in patterns)


def test_the_tokenizer_beside_a_saved_model_runs_no_code(tmp_path, imported):
    adapter = object.__new__(mlx_lm.MLXLanguageModel)
    adapter.place, adapter._tokenizer = str(write(tmp_path / "saved", tokenizer={"auto_map": {}})), None
    with pytest.raises(ArtifactError, match="auto_map asks to run"):
        _ = adapter.tokenizer
    assert not imported


@pytest.mark.mlxlm
@pytest.mark.parametrize(("files", "message"), CASES)
def test_with_the_package(tmp_path, files, message):
    pytest.importorskip("mlx_lm")
    with pytest.raises(ArtifactError, match=message):
        load(write(tmp_path / "model", **files))
    assert not (tmp_path / "model" / "marker").exists()
