"""A huggingface_hub without a network, for tests where the package need not be installed."""

import sys
import types


class RepositoryNotFoundError(Exception):
    pass


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    """A subclass of the other, as in the package."""


def stand_in(monkeypatch, download):
    """Have ``download(repository, name)`` in the place of the package's function."""
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download, module.errors = download, sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
