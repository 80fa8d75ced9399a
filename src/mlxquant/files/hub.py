"""What others publish: files from the hub's cache, downloaded where they are not there yet, and the tensors in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError, ArtifactError, reason
from .explain import explain
from .schema import json_value

UNREAD = "unsupported dtype"  # what MLX says of a tensor of another kind, F8_E5M2 or F64, and then which
DESCRIPTIONS = ("model_index.json", "config.json")  # of diffusers' pipelines, of everything else


def hub_files(repository: str, names: Sequence[str], extra: str, instead: str) -> list[Path]:
    """Files of a hub repository on this disk; HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are honoured.

    Args:
        repository: A hub id.
        names: Paths in the repository.
        extra: The extra of mlxquant that brings huggingface_hub.
        instead: What a user can do without the hub.

    Returns:
        A path for each name, in order.

    Raises:
        AdapterError: Without the package.
        ArtifactError: When a file cannot be had; it says what to do.
    """
    hub = _package(repository, extra, instead)
    found = []
    for name in names:
        try:
            found.append(Path(hub.hf_hub_download(repository, name)))
        except Exception as error:  # the hub's, httpx's and xet's errors have no base in common
            raise ArtifactError(repository + _refusal(hub, error, repository, name, names, instead)) from error
    return found


def first_hub_file(repository: str, names: Sequence[str], extra: str, instead: str) -> Path | None:
    """The first of some files that a hub repository has; None where it has none of them.

    The cache is asked for all of them before the hub is: who has a model on the disk waits for no network. Where the
    hub cannot be reached, what is not in the cache is not there.

    ``extra``, ``instead`` and what is raised are as for ``hub_files``.
    """
    hub = _package(repository, extra, instead)
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name, local_files_only=True))
        except hub.errors.EntryNotFoundError:
            continue
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name))
        except Exception as error:  # the hub's, httpx's and xet's errors have no base in common
            if isinstance(error, hub.errors.EntryNotFoundError):
                continue
            raise ArtifactError(repository + _refusal(hub, error, repository, name, names, instead)) from error
    return None


def hub_folder(repository: str, patterns: Sequence[str], extra: str, instead: str) -> Path:
    """The newest snapshot of a hub repository on this disk, of its files only those that fit one of the ``patterns``.

    ``extra``, ``instead`` and what is raised are as for ``hub_files``.
    """
    hub = _package(repository, extra, instead)
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's, httpx's and xet's errors have no base in common
        raise ArtifactError(repository + _refusal(hub, error, repository, "the model", [], instead)) from error


def hub_description(repository: str, extra: str, instead: str) -> dict[str, Any]:
    """What a hub repository says that it holds: the first of ``DESCRIPTIONS`` that can be had.

    The cache is asked before the hub: a repository does not change its kind, and who has a model on the disk should not
    wait for a network. Where the files are refused, the hub's public record answers. FLUX.1-dev is such a repository:
    its files are for those who accepted its licence, its kind is not.

    Args:
        repository: A hub id.
        extra: The extra of mlxquant that brings huggingface_hub.
        instead: What a user can do without the hub.

    Returns:
        The JSON object, empty where there is none. Its ``_class_name`` is a pipeline of diffusers, its ``model_type`` a
        model of transformers.

    Raises:
        AdapterError: Without the package.
        ArtifactError: When the repository cannot be asked; it says what to do.
    """
    hub = _package(repository, extra, instead)
    for name in DESCRIPTIONS:
        try:
            return read_description(Path(hub.hf_hub_download(repository, name, local_files_only=True)))
        except hub.errors.EntryNotFoundError:
            continue  # what is not in the cache the hub is asked for
    for name in DESCRIPTIONS:
        try:
            path = Path(hub.hf_hub_download(repository, name))
        except Exception as error:  # the hub's, httpx's and xet's errors have no base in common
            if _has_no_such_file(hub, error):
                continue
            why = _refusal(hub, error, repository, name, [], instead)
            if _is_refused(hub, error):
                return _public_record(hub, repository, why)
            if isinstance(error, hub.errors.LocalEntryNotFoundError):
                why = (
                    f": neither {' nor '.join(DESCRIPTIONS)} is in the cache, and the hub cannot be reached; fill the"
                    f" cache on a connected machine without HF_HUB_OFFLINE ('hf download {repository}'), or {instead}"
                )
            raise ArtifactError(f"{repository} could not be asked what it holds{why}") from error
        return read_description(path)
    return {}


def _public_record(hub: Any, repository: str, why: str) -> dict[str, Any]:
    """What the hub tells everybody about a repository whose files it refuses; raises ArtifactError, saying ``why`` they
    are refused, where that is nothing.
    """
    try:
        config = hub.model_info(repository).config or {}
    except Exception as error:
        raise ArtifactError(repository + why) from error
    return {**config, **config.get("diffusers", {})}


def _package(repository: str, extra: str, instead: str) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import errors  # noqa: F401 (an attribute of the package from here on)
    except ImportError as error:
        raise AdapterError(
            f"{repository} comes from the hub: install huggingface_hub with pip install 'mlxquant[{extra}]', or"
            f" {instead}"
        ) from error
    return huggingface_hub


def _refusal(hub: Any, error: Exception, repository: str, name: str, names: Sequence[str], instead: str) -> str:
    """Why a file was not to be had, and what to do about it."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    if _is_refused(hub, error):
        return (
            f": not visible to you; accept the licence at https://huggingface.co/{repository} with your account, then"
            " run 'hf auth login' or set HF_TOKEN (a fine-grained token needs access to public gated repositories)"
        )
    if isinstance(error, hub.errors.LocalEntryNotFoundError):
        return (
            f": {name} is not in the cache and the hub cannot be reached; download it with"
            f" '{' '.join(['hf download', repository, *names])}' on a connected machine without HF_HUB_OFFLINE, or"
            f" {instead}"
        )
    if _has_no_such_file(hub, error):
        return f" has no file {name}; the repository has changed, {instead}"
    return f": {name} could not be downloaded ({said}); run the same command again, what is there is kept, or {instead}"


def _is_refused(hub: Any, error: Exception) -> bool:
    """Whether the hub has answered that the repository is not there, or not for this user."""
    statuses = {_status(error), _status(error.__cause__)}
    return isinstance(error, hub.errors.RepositoryNotFoundError) or bool(statuses & {401, 403})


def _has_no_such_file(hub: Any, error: Exception) -> bool:
    """Whether the hub has answered, and has no such file; a file that is not in the cache is another matter."""
    return isinstance(error, hub.errors.EntryNotFoundError) and not isinstance(
        error, hub.errors.LocalEntryNotFoundError
    )


def read_description(path: Path, infinite: bool = False) -> dict[str, Any]:
    """The object in one of the ``DESCRIPTIONS``; raises ArtifactError on a damaged file. ``infinite`` numbers may be in
    what diffusers wrote, and come as text then, such as "-Infinity".
    """
    try:
        text = path.read_text(encoding="utf-8")
        said = json_value(text, str) if infinite else json_value(text)
    except OSError as error:
        raise explain(error, path) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON, or damaged ({reason(error)}); download it again") from error
    return said if isinstance(said, dict) else {}


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
        if UNREAD in str(error):
            kind = str(error).rpartition(" ")[2]
            raise ArtifactError(
                f"{path}: a tensor is stored as {kind}, which MLX does not read: the file is quantized already, or for"
                " another program; expected float16, bfloat16 or float32: get the full-precision file"
            ) from error
        raise ArtifactError(
            f"{path}: not a safetensors file, or a damaged one ({reason(error)}); download it again"
        ) from error
    assert isinstance(arrays, dict)
    return arrays
