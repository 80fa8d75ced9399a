"""A huggingface_hub without a network, for tests where the package need not be installed."""

import json
import sys
import types


class RepositoryNotFoundError(Exception):
    pass


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    """A subclass of the other, as in the package."""


def stand_in(monkeypatch, download, model_info=None):
    """Have ``download(repository, name, **options)`` in the place of the package's function, and ``model_info``."""
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download, module.errors, module.model_info = download, sys.modules[__name__], model_info
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def repositories(monkeypatch, folder, held, cached=(), record=None):
    """A hub whose repositories hold files with JSON in them: ``held`` by repository and name.

    Those of ``cached`` are on this disk. An exception in place of a repository's files is what asking for them gives.
    ``record`` is what the hub tells everybody. Returns the names that were asked of the hub itself.
    """
    asked = []

    def download(repository, name, local_files_only=False):
        files = held.get(repository, RepositoryNotFoundError("404"))
        if local_files_only and repository not in cached:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            asked.append(name)
            if isinstance(files, Exception):
                raise files
        if name not in files:
            raise LocalEntryNotFoundError(name) if local_files_only else EntryNotFoundError(name)
        path = folder / repository.replace("/", "--") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name] if isinstance(files[name], str) else json.dumps(files[name]))
        return str(path)

    def model_info(repository):
        if record is None:
            raise RepositoryNotFoundError("404")
        return types.SimpleNamespace(config=record)

    stand_in(monkeypatch, download, model_info)
    return asked
