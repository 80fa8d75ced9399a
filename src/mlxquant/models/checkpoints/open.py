"""Opening what a user names: a folder, a repository of the hub, or a single file."""

from __future__ import annotations

from pathlib import Path

from .folder import DiffusersFolder
from .sd1_file import SD1_FILE
from .sd3_file import SD3_FILE
from .single_file import SingleFile
from .source import Source

LAYOUTS = (SD1_FILE, SD3_FILE)  # of single files


def open_source(place: str) -> Source:
    """The source that a place is.

    Args:
        place: A folder in the layout of diffusers, a hub id, or a single file.

    Raises:
        ArtifactError: It is none of these, or damaged; it says what to do.
    """
    return SingleFile(place, LAYOUTS) if Path(place).is_file() else DiffusersFolder(place)
