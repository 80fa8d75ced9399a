"""Opening what a user names: a folder, a repository of the hub, or a single file."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ArtifactError
from .folder import DiffusersFolder
from .sd1_file import SD1_FILE
from .sd3_file import SD3_FILE
from .single_file import SingleFile
from .source import Source

LAYOUTS = (SD1_FILE, SD3_FILE)  # of single files
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # OWNER/NAME


def open_source(place: str) -> Source:
    """The source that a place is.

    Args:
        place: A folder in the layout of diffusers, a hub id, or a single file.

    Raises:
        ArtifactError: It is none of these, or damaged; it says what to do.
    """
    if not Path(place).exists() and not re.fullmatch(REPOSITORY, place):
        raise ArtifactError(
            f"{place}: no such folder or file. A saved model's text encoders and autoencoder are expected there, as"
            " they were when it was made: put them back, or a link, or set model.adapter.place"
        )
    return SingleFile(place, LAYOUTS) if Path(place).is_file() else DiffusersFolder(place)
