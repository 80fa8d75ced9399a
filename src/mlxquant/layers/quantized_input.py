"""How a module quantizes what it reads: by a static table, each token on its own scale, or not at all.

The table is parameters, so that it is saved and loaded with the rest; what reads it, with its levels prepared, is made
of them once, when the first input comes. MLX does not tell a module when its parameters are loaded: whoever changes
them calls ``refresh`` afterwards, or the old table goes on being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..grids.reading import TableReader, TokenReader
from ..grids.tables import ActivationTable
from ..grids.time import Clock
from ..grids.time_network import NetworkShape, TimeNetwork
from .names import BITS, FOR_INPUT, LOG, NETWORK, SHIFT, SIGMA, STEP, TABLE, TOKEN
from .own import QuantizedModule


class QuantizedInput(QuantizedModule):
    """A module whose input may be quantized.

    Parameters: with a table, ``act_sigma``, ``act_step``, ``act_shift``, ``act_bits`` and, where an entry is
    logarithmic, ``act_log`` (see ActivationTable); where a network over time made the table, its numbers as
    ``act_network`` float32; or ``act_token`` uint8 [1], with how many bits each token is quantized by itself.
    """

    _network: NetworkShape | None = None  # of the network over time, whose numbers are a parameter

    def _lay_out_input(
        self, clock: Clock | None, entries: int, shifts: int, log: bool, network: Mapping[str, Any] | None = None
    ) -> None:
        """The parameters of a table of ``entries`` noise levels with ``shifts`` shifts each, zero and not evaluated,
        and of a network with these facts.
        """
        self._clock: Clock | None = clock
        self._network = None if network is None else NetworkShape.of(network)
        if self._network is not None:
            self[NETWORK] = mx.zeros((self._network.size,), mx.float32)
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
        if table.network is not None:
            self._network, self[NETWORK] = table.network.shape, mx.array(table.network.numbers)
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
        self._clock = self._network = None
        for name in FOR_INPUT:
            self.pop(name, None)
        self.refresh()

    def refresh(self) -> None:
        self._reader: TableReader | TokenReader | None = None

    @property
    def reader(self) -> TableReader | TokenReader | None:
        """What says how an input is quantized, if it is."""
        if self._reader is None and self._clock is not None:
            sigma, step, shift, bits = (np.array(self[name]) for name in (SIGMA, STEP, SHIFT, BITS))
            log = np.array(self.get(LOG, False))
            network = None if self._network is None else TimeNetwork.of(self._network, np.array(self[NETWORK]))
            self._reader = TableReader(ActivationTable(sigma, step, shift, bits, log, network), self._clock)
        if self._reader is None and TOKEN in self:
            self._reader = TokenReader(int(np.array(self[TOKEN])[0]))
        return self._reader

    @property
    def _network_facts(self) -> dict[str, Any]:
        """What of a layer's facts is about a network over time: nothing where there is none."""
        return {} if self._network is None else {"network": self._network.facts}

    @property
    def table(self) -> ActivationTable | None:
        """The table that the input is quantized by, if it is."""
        return self.reader.table if isinstance(self.reader, TableReader) else None

    @property
    def input_bits(self) -> float:
        """With how many bits the input is quantized, averaged over noise levels; 16 where it is not."""
        return 16.0 if self.reader is None else self.reader.mean_bits
