"""Every error that a user can cause. A message is one line of at most ``LIMIT`` characters that says where, what was
found, what was expected and what to do.
"""

from __future__ import annotations

LIMIT = 500  # characters of a message


class MlxQuantError(Exception):
    """Base of all errors that mlxquant raises on purpose; the command line prints it without a traceback."""

    def __init__(self, message: str = ""):
        super().__init__(shortened(message))


class RecipeError(MlxQuantError):
    """A recipe, a specification or one of its globs is wrong."""


class ArtifactError(MlxQuantError):
    """A file or folder is missing, foreign, damaged, of another version, or cannot be written."""


class AdapterError(MlxQuantError):
    """A model is unknown, or does not fit the data it is given."""


class CalibrationError(MlxQuantError):
    """Calibration data is missing, empty, or does not belong to the model."""


class NumericsError(MlxQuantError):
    """A tensor holds NaN or infinity, or a matrix is not positive definite."""


class ExportError(MlxQuantError):
    """The target format cannot carry what the model holds."""


def shortened(text: str, limit: int = LIMIT) -> str:
    """A text as one line of at most ``limit`` characters: where it is longer its middle goes, for it begins with where
    and what, and ends with what to do.
    """
    if len(text) > 4 * limit:  # so that a text of megabytes is not looked through
        text = text[: 2 * limit] + text[-2 * limit :]
    line = " ".join(text.splitlines())
    if len(line) <= limit:
        return line
    end = 2 * limit // 5
    return f"{line[: limit - end - 3]} … {line[-end:]}"


def reason(error: BaseException, limit: int = LIMIT // 2) -> str:
    """What an error of another package says, with its kind, short. The ``repr`` of a UnicodeDecodeError would have all
    that was to be decoded.
    """
    if isinstance(error, MlxQuantError):
        return shortened(str(error), limit)
    return shortened(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, limit)
