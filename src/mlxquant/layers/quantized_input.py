"""How a module quantizes what it reads: by a static table, each token on its own scale, or not at all.

The table is parameters, so that it is saved and loaded with the rest; what reads it, with its levels prepared, is made
of them once, when the first input comes. MLX does not tell a module when its parameters are loaded: whoever changes
them calls ``refresh`` afterwards, or the old table goes on being read.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..grids.reading import TableReader, TokenReader
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from .names import FOR_INPUT, LOG, SHIFT, TABLE, TOKEN
from .own import QuantizedModule


class QuantizedInput(QuantizedModule):
    """A module whose input may be quantized.

    Parameters: with a table, ``act_sigma``, ``act_step``, ``act_shift``, ``act_bits`` and, where an entry is
    logarithmic, ``act_log`` (see ActivationTable); or ``act_token`` uint8 [1], with how many bits each token is
    quantized by itself.
    """

    def _lay_out_input(self, clock: Clock | None, entries: int, shifts: int, log: bool) -> None:
        """The parameters of a table of ``entries`` noise levels with ``shifts`` shifts each, zero and not evaluated."""
        self._clock: Clock | None = clock
        for name, dtype in TABLE.items():
            if name != LOG or log:
                self[name] = mx.zeros((entries, shifts) if name == SHIFT else (entries,), dtype)

    def set_activations(self, table: ActivationTable, clock: Clock) -> None:
        """Quantize the input from now on, by a table.

        Args:
            table: Its entries, one a noise level.
            clock: Shows at which noise level the input is; whoever calls the model sets it.

        Raises:
            AdapterError: When the table's shifts do not fit the input.
        """
        self.drop_activations()  # first: what this table has no use for, an older one's act_log, must not stay
        self._clock = clock
        values = (table.sigma, table.step, table.shift, table.bits, table.log)
        for (name, dtype), value in zip(TABLE.items(), values, strict=True):
            if name != LOG or table.log.any():
                self[name] = mx.array(value, dtype)
        self.refresh()

    def quantize_tokens(self, bits: int) -> None:
        """Quantize the input from now on, each token [...,in] on its own scale.

        Args:
            bits: Bits of a value, 4, 6 or 8; others are an error when the first input comes.
        """
        self.drop_activations()
        self[TOKEN] = mx.array([bits], mx.uint8)
        self.refresh()

    def drop_activations(self) -> None:
        """Run with unquantized inputs from now on."""
        self._clock = None
        for name in FOR_INPUT:
            self.pop(name, None)
        self.refresh()

    def refresh(self) -> None:
        self._reader: TableReader | TokenReader | None = None

    @property
    def reader(self) -> TableReader | TokenReader | None:
        """What says how an input is quantized, if it is."""
        if self._reader is None and self._clock is not None:
            stored = (np.array(self[name]) for name in TABLE if name in self)
            self._reader = TableReader(ActivationTable(*stored), self._clock)
        if self._reader is None and TOKEN in self:
            self._reader = TokenReader(int(np.array(self[TOKEN])[0]))
        return self._reader

    @property
    def table(self) -> ActivationTable | None:
        """The table that the input is quantized by, if it is."""
        return self.reader.table if isinstance(self.reader, TableReader) else None

    @property
    def input_bits(self) -> float:
        """With how many bits the input is quantized, averaged over noise levels; 16 where it is not."""
        return 16.0 if self.reader is None else self.reader.mean_bits
