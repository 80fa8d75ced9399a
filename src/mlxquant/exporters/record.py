"""``export.json`` in a folder that was written for another tool: what was written from what, and the checksum of every
file. By it the folder is known as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import checked
from ..files.checked import file_digest, write_json

KIND, FACTS = "export", "export.json"


def write_record(folder: Path, facts: Mapping[str, Any], layers: Mapping[str, Any]) -> int:
    """Write it, the last file of the folder, with these facts and with what is quantized how.

    Returns:
        The bytes of all other files.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    nbytes = sum(path.stat().st_size for path in files.values())
    digests = {name: file_digest(path) for name, path in files.items()}
    facts = {**facts, "bytes": nbytes, "layers": layers, "files": digests, **checked.versions()}
    write_json(folder / FACTS, KIND, facts)
    return nbytes
