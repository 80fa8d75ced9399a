"""Where the parts of a picture model come from: what a host asks, whatever the layout on disk.

A host asks for a component by the name that diffusers gives it, "transformer" or "text_encoder_2", and gets its config
and its tensors under diffusers' and transformers' own names. Whether they lie in a folder, on the hub or in a single
file that another program wrote is the source's affair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ...errors import ArtifactError
from ...files.hub import lazy_tensors

Tensors = dict[str, mx.array]


def float_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, of which each can be computed with, read from the disk when they are used.

    Raises:
        ArtifactError: The file is damaged; or a tensor of it is stored in 8 bits, as fp8 files have them, which MLX
            would read as whole numbers.
    """
    arrays = lazy_tensors(path)
    if coded := next((name for name, value in arrays.items() if value.dtype in (mx.uint8, mx.int8)), None):
        raise ArtifactError(
            f"{path}: {coded} is stored in 8 bits, so the file is quantized already (fp8); expected float16, bfloat16"
            " or float32: get the full-precision file"
        )
    return arrays


class Source(Protocol):
    """A copy of a model.

    Attributes:
        place: What the user said: a hub id, a folder or a file.
        pipeline: The class of diffusers that would run it, such as "StableDiffusion3Pipeline".
    """

    place: str
    pipeline: str

    def has(self, component: str) -> bool:
        """Whether the model has a component; one that it names and that is not there is an error where it is read."""
        ...

    def config(self, component: str) -> dict[str, Any]:
        """A component's config.json, or scheduler_config.json.

        Raises:
            ArtifactError: It is missing or damaged; it says how to get it.
        """
        ...

    def tensors(self, component: str) -> Tensors:
        """A component's tensors under the names and in the layouts of torch, read from the disk when they are used.

        Raises:
            ArtifactError: A file is missing or damaged, or of a kind that cannot be read; it says what to do.
        """
        ...

    def file(self, component: str, name: str) -> Path:
        """Another file of a component, such as vocab.json.

        Raises:
            ArtifactError: It is missing; it says how to get it.
        """
        ...

    def finds(self, component: str, name: str) -> Path | None:
        """The same, and None where the component has no such file."""
        ...
