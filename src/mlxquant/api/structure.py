"""What the facts of a quantized model have to be, before anything is built from them."""

from __future__ import annotations

from ..files import schema
from ..layers.attention import QuantizedAttention
from ..layers.kinds import structure
from ..sweep.store import STAGES

STRUCTURE = schema.entries(
    {
        "files": schema.table_of(schema.text, 1, keys=schema.inside),
        "model": schema.entries({"name": schema.text}, {"place": schema.text}),
        "layers": schema.table_of(structure),
    },
    {
        "attentions": schema.table_of(QuantizedAttention.STRUCTURE),
        "plain": schema.array_of(schema.text),
        "stages": STAGES,
    },
)
