"""What others publish: files from the hub's cache, downloaded where they are not there yet, and the tensors in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import AdapterError, ArtifactError


def hub_files(repository: str, names: Sequence[str], extra: str, instead: str) -> list[Path]:
    """Files of a hub repository on this disk; HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are honoured.

    ``extra`` is the extra of mlxquant that brings huggingface_hub, ``instead`` what a user can do without the hub.
    Raises AdapterError without the package, ArtifactError, saying what to do, when a file cannot be had.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise AdapterError(
            f"{repository} comes from the hub: install huggingface_hub with pip install 'mlxquant[{extra}]', or"
            f" {instead}"
        ) from error
    found = []
    for name in names:
        try:
            found.append(Path(hf_hub_download(repository, name)))
        except Exception as error:  # the hub's, httpx's and xet's errors have no base in common
            said = (str(error) or type(error).__name__).splitlines()[0]
            if isinstance(error, errors.RepositoryNotFoundError) or {_status(error), _status(error.__cause__)} & {
                401,
                403,
            }:
                why = (
                    f": not visible to you; accept the licence at https://huggingface.co/{repository} with your"
                    " account, then run 'hf auth login' or set HF_TOKEN (a fine-grained token needs access to public"
                    " gated repositories)"
                )
            elif isinstance(error, errors.LocalEntryNotFoundError):
                why = (
                    f": {name} is not in the cache and the hub cannot be reached; download it with 'hf download"
                    f" {repository} {' '.join(names)}' on a connected machine without HF_HUB_OFFLINE, or {instead}"
                )
            elif isinstance(error, errors.EntryNotFoundError):
                why = f" has no file {name}; the repository has changed, {instead}"
            else:
                why = (
                    f": {name} could not be downloaded ({said}); run the same command again, what is there is kept, or"
                    f" {instead}"
                )
            raise ArtifactError(repository + why) from error
    return found


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def lazy_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file, not read from the disk before they are used; ArtifactError when it is
    damaged.
    """
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: not a safetensors file, or a damaged one ({error}); download it again") from error
    assert isinstance(arrays, dict)
    return arrays
