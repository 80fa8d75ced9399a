"""What is said when a file cannot be had from the hub, each time with what to do about it. The package's own errors:
``tests/host``.
"""

import builtins

import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.files.hub import hub_files

from support.hub_stand_in import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, stand_in


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
