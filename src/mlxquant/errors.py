"""Every error that a user can cause. A message says where, what was found, what was expected and what to do."""

from __future__ import annotations


class MlxQuantError(Exception):
    """Base of all errors that mlxquant raises on purpose; the command line prints it without a traceback."""


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
