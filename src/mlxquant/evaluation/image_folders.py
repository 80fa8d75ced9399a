"""Folders of pictures that other tools wrote, paired by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ArtifactError
from ..files.explain import explain
from ..numerics.arrays import Array

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # of 8 bits, that are pictures in sRGB with or without transparency


def paired(folders: Sequence[Path]) -> tuple[list[str], list[list[Path]]]:
    """Names of the pictures, sorted, and the files of each folder in that order.

    Raises ArtifactError on a folder without pictures, on two files of one name, on a picture that another folder lacks,
    and on one that is damaged or of another size than the first folder's.
    """
    found = [pictures(folder) for folder in folders]
    names = sorted(found[0])
    for folder, files in zip(folders[1:], found[1:], strict=True):
        for here, there, missing in (
            (folders[0], folder, set(names) - set(files)),
            (folder, folders[0], set(files) - set(names)),
        ):
            if missing:
                some = ", ".join(found[folders.index(here)][name].name for name in sorted(missing)[:3])
                raise ArtifactError(
                    f"{there}: has no partner for {len(missing)} of the pictures in {here}, such as {some}; name"
                    " partners alike, or remove what has none"
                )
    rows = [[files[name] for name in names] for files in found]
    for first, *others in zip(*rows, strict=True):
        size = picture_size(first)
        for other in others:
            if (own := picture_size(other)) != size:
                raise ArtifactError(
                    f"{other}: {own[0]}x{own[1]} pixels, {first} has {size[0]}x{size[1]}; draw both at one size"
                )
    return names, rows


def pictures(folder: Path) -> dict[str, Path]:
    """The PNG and JPEG files of a folder by name without suffix; hidden ones are left out."""
    try:
        files = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
    except OSError as error:
        raise explain(error, folder) from error
    if not files:
        raise ArtifactError(f"{folder}: holds no pictures; expected files that end in {', '.join(SUFFIXES)}")
    named: dict[str, Path] = {}
    for path in files:
        if path.stem in named:
            raise ArtifactError(f"{folder}: {named[path.stem].name} and {path.name} have one name; keep one of them")
        named[path.stem] = path
    return named


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height; raises ArtifactError on what is no picture of ours to read, without decoding all of it."""
    with _opened(path) as image:
        return image.size


def read_picture(path: Path) -> Array:
    """A picture as a batch of one [1,H,W,3] float32 in [0,1]; what is transparent shows white. Raises ArtifactError
    when it is damaged.
    """
    with _opened(path) as image:
        try:
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise ArtifactError(f"{path}: damaged picture ({error}); write or copy it anew") from error
        if image.mode in ("RGBA", "LA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear)
        else:
            flat = image
        return np.asarray(flat.convert("RGB"), np.float32)[None] / 255


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        raise ArtifactError(f"{path}: not a PNG or JPEG, or a damaged one; write or copy it anew") from error
    except (Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise ArtifactError(f"{path}: cannot be read as a picture ({error}); write or copy it anew") from error
    except OSError as error:
        raise explain(error, path) from error
    if image.mode not in MODES:
        image.close()
        raise ArtifactError(
            f"{path}: pixels of kind {image.mode!r}; expected an 8-bit picture ({', '.join(MODES)}), convert it to sRGB"
        )
    return image
