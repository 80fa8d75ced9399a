"""A sweep that is stopped in the moment in which it would keep another stage."""

from contextlib import contextmanager

import pytest

from mlxquant.sweep.store import FolderStore


@contextmanager
def killed_after(stages):
    """What runs in the block has kept so many stages when it is interrupted, which it has to be."""
    done, save = [], FolderStore.save

    def stop(self, which, result):
        if len(done) == stages:
            raise KeyboardInterrupt
        done.append(which.name)
        save(self, which, result)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderStore, "save", stop)
        yield
