"""What is said when a file cannot be had from the hub, each time with what to do about it. The package's own errors:
``tests/host``.
"""

import builtins
import json

import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.files.hub import hub_description, hub_files

from support.hub_stand_in import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    repositories,
    stand_in,
)


def get():
    return hub_files("someone/net", ["a.bin", "b.json"], "evaluate", "draw it yourself")


def of_status(status):
    error = RuntimeError(f"status {status}\nand more")
    error.response = type("Response", (), {"status_code": status})
    return error


def caused_by(status):
    error = LocalEntryNotFoundError("offline")
    error.__cause__ = of_status(status)
    return error


def test_files_come_in_order(monkeypatch, tmp_path):
    stand_in(monkeypatch, lambda repository, name: str(tmp_path / repository / name))
    assert get() == [tmp_path / "someone/net" / name for name in ("a.bin", "b.json")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404"), "accept the licence at https://huggingface.co/someone/net "),
        (of_status(401), "set HF_TOKEN"),
        (caused_by(403), "fine-grained token"),
        (
            LocalEntryNotFoundError("offline"),
            "'hf download someone/net a.bin b.json' on a connected machine .*, or draw it yourself$",
        ),
        (EntryNotFoundError("no"), "someone/net has no file a.bin; .*, draw it yourself$"),
        (of_status(500), r"a.bin could not be downloaded \(status 500\); run the same command again"),
        (TimeoutError(), r"\(TimeoutError\)"),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(monkeypatch, error, message):
    def refuse(repository, name):
        raise error

    stand_in(monkeypatch, refuse)
    with pytest.raises(ArtifactError, match=message) as caught:
        get()
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(AdapterError, match=r"someone/net .* pip install 'mlxquant\[evaluate\]', or draw it yourself$"):
        get()


PIPELINE = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
LLAMA = {"model_type": "llama"}


def describe(repository="someone/net"):
    return hub_description(repository, "evaluate", "pass a folder")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"model_index.json": PIPELINE}, PIPELINE),
        ({"config.json": LLAMA}, LLAMA),
        ({"config.json": LLAMA, "model_index.json": PIPELINE}, PIPELINE),
        ({"config.json": ["odd"]}, {}),
        ({"README.md": ""}, {}),
    ],
)
def test_a_repository_says_what_it_holds(monkeypatch, tmp_path, files, found):
    repositories(monkeypatch, tmp_path, {"someone/net": files})
    assert describe() == found


def test_the_cache_is_asked_first_and_then_alone(monkeypatch, tmp_path):
    """A language model's cache has no model_index.json; the hub need not be asked for it."""
    asked = repositories(monkeypatch, tmp_path, {"someone/net": {"config.json": LLAMA}}, cached=["someone/net"])
    assert describe() == LLAMA
    assert asked == []


def test_a_gated_repository_is_told_apart_by_its_public_record(monkeypatch, tmp_path):
    gated = RepositoryNotFoundError("401: gated")
    record = {"diffusers": {"_class_name": "FluxPipeline"}}
    repositories(monkeypatch, tmp_path, {"someone/net": gated}, record=record)
    assert describe()["_class_name"] == "FluxPipeline"
    repositories(monkeypatch, tmp_path, {"someone/net": caused_by(403)}, record=LLAMA)
    assert describe() == LLAMA


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("offline"),
            "^someone/net could not be asked what it holds: neither model_index.json nor config.json is in the cache,"
            " and the hub cannot be reached; .*'hf download someone/net'.*, or pass a folder$",
        ),
        (RepositoryNotFoundError("404"), "^someone/net: not visible to you; accept the licence"),
        (of_status(500), "^someone/net could not be asked what it holds: .*status 500.*run the same command again"),
    ],
)
def test_a_repository_that_cannot_be_asked_is_one_line_with_a_remedy(monkeypatch, tmp_path, error, message):
    repositories(monkeypatch, tmp_path, {"someone/net": error})
    with pytest.raises(ArtifactError, match=message) as caught:
        describe()
    assert "\n" not in str(caught.value)


def test_a_damaged_description_is_named(monkeypatch, tmp_path):
    repositories(monkeypatch, tmp_path, {"someone/net": {"config.json": '{"model_type'}})
    with pytest.raises(ArtifactError, match=r"config\.json: not JSON, or damaged"):
        describe()


@pytest.mark.mlxlm
def test_the_real_package_reads_its_cache_without_a_network(monkeypatch, tmp_path):
    """As mlx-lm leaves it there."""
    from huggingface_hub import constants

    for name, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, name, value)
    snapshot = tmp_path / "models--someone--net" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    refs = tmp_path / "models--someone--net" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert describe() == LLAMA
    with pytest.raises(ArtifactError, match="someone/other could not be asked what it holds"):
        describe("someone/other")
