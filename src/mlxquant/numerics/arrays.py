"""The one name of NumPy arrays in signatures; shapes and dtypes stand in docstrings."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
