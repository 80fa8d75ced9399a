"""What a model that draws reads besides the latent, whatever it is: arrays by name, one row for each sample.

Text encoders of one model hand over tokens and a pooled embedding, those of another tokens and a mask, a third adds
sizes or a guidance weight. Nobody but a model's own adapter has to know which: everything else takes rows and joins
them.
"""

from __future__ import annotations

from collections.abc import KeysView

import mlx.core as mx

from ..errors import AdapterError


class Conditioning:
    """Arrays by name, all of the same number of rows, such as ``Conditioning(tokens=..., pooled=...)``.

    Args:
        rows: At least one array [B,...] under each name. ``{**conditioning}`` gives them back.

    Raises:
        AdapterError: Without arrays, or when they differ in their number of rows.
    """

    def __init__(self, **rows: mx.array):
        counts = {name: array.shape[0] if array.ndim else None for name, array in rows.items()}
        if len(set(counts.values())) != 1 or None in counts.values():
            told = ", ".join(f"{name} {list(array.shape)}" for name, array in rows.items()) or "none"
            raise AdapterError(
                f"a conditioning has at least one array, and all have the same number of rows; found {told}"
            )
        self._rows = rows

    def __len__(self) -> int:
        return next(iter(self._rows.values())).shape[0]

    def __getitem__(self, name: str) -> mx.array:
        return self._rows[name]

    def keys(self) -> KeysView[str]:
        return self._rows.keys()

    def take(self, rows: slice | mx.array) -> Conditioning:
        """Some of the rows, by a slice or by their places, int [B]."""
        return Conditioning(**{name: array[rows] for name, array in self._rows.items()})

    def joined(self, other: Conditioning) -> Conditioning:
        """These rows and then the other's; raises AdapterError where they are of other names or shapes."""
        ours, theirs = ({name: array.shape[1:] for name, array in side._rows.items()} for side in (self, other))
        if ours != theirs:
            raise AdapterError(
                f"conditionings cannot be joined: rows of {ours} and of {theirs}; expected the same names and shapes"
                " (pad what is shorter)"
            )
        return Conditioning(**{name: mx.concatenate([self[name], other[name]]) for name in ours})

    def beside(self, **rows: mx.array) -> Conditioning:
        """With more arrays, which replace those of the same name."""
        return Conditioning(**(self._rows | rows))
