"""Whether a folder that mflux wrote has the tensors that a pipeline wants: where it finds none, mflux leaves the random
numbers that a module is made with, and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import ArtifactError, reason
from ...layers.tree import parameters
from .components import Component

INDEX = "model.safetensors.index.json"
METADATA = "mflux_version"  # of a file that mflux wrote


def check_saved(folder: Path, components: Sequence[Component], name: str) -> None:
    """Compare the names of all tensors, component by component; a folder in the hub's layout mflux checks itself.

    Raises:
        ArtifactError: A tensor is missing, or there are others; a file is damaged.
    """
    for component in components:
        place = folder / component.folder
        if not (place / INDEX).is_file():
            continue
        found, ours = set[str](), False
        for path in sorted(place.glob("*.safetensors")):
            try:
                loaded: Any = mx.load(str(path), return_metadata=True)
            except (RuntimeError, ValueError) as error:
                raise ArtifactError(f"{path}: is damaged ({reason(error)}); copy or save it again") from error
            found |= loaded[0].keys()
            ours = ours or METADATA in loaded[1]
        wanted = set(parameters(component.module))
        if not ours or found == wanted:
            continue
        missing, others = sorted(wanted - found), sorted(found - wanted)
        what = f"{len(missing)} tensors are missing, such as {missing[0]}" if missing else ""
        what += (" and " if missing and others else "") + (
            f"{len(others)} are not its own, such as {others[0]}" if others else ""
        )
        raise ArtifactError(
            f"{place}: {what}; this is no whole {component.name} of {name}: save it again, or name the model that it is"
        )
