"""Files that programs in torch leave: pickles, which run whatever code is in them when they are read.

mlxquant neither writes nor reads them, and says so before it looks whether they are there. The one exception, tables
of tensors with the weights of metrics, is ``metrics.torch_file``.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError

SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt")


def refuse_pickle(path: Path, remedy: str) -> None:
    """Raise ArtifactError, saying what to do, where a file goes by the name of a pickle; a folder may."""
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        raise ArtifactError(
            f"{path}: a pickle ({path.suffix}) runs whatever code is in it when it is read; mlxquant has none, {remedy}"
        )
