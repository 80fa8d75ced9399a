"""An operating system's errors as ours."""

from __future__ import annotations

import errno
from pathlib import Path

from ..errors import ArtifactError


def explain(error: OSError, path: Path) -> ArtifactError:
    """An operating system's error as one of ours, with a remedy."""
    remedies = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EROFS: "choose a folder on a writable disk",
        errno.EACCES: "check the permissions or choose another place",
        errno.EPERM: "check the permissions or choose another place",
        errno.EEXIST: "a part of the path is a file; choose another place",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a part of the path is a file; choose another place",
        errno.EISDIR: "this is a folder; name a file",
    }
    return ArtifactError(f"{path}: {error.strerror or error}; {remedies.get(error.errno or 0, 'check the path')}")
