"""Names for people: ``fast``, ``good`` and ``best`` with any SPEC, such as ``good-w4a16``.

Each stands for a recipe, another one where inputs are quantized. They get better with releases, and what a name stands
for in this one is what the result is called: a model that was asked for as ``good-w4a16`` says by which recipe it was
made, and the same recipe makes it again in any release.

- ``fast`` is GPTQ.
- ``good`` is what measures best in about twice its time with the same bits in every layer. Bits of their own
  (``mixed``) are worth far more on most models and take no longer on small ones; but on a model of few steps they cost
  quality, and on large ones hours.
- ``best`` is what measures best at these bytes, whatever it takes.
"""

from __future__ import annotations

import re

LADDER = {  # by name what it stands for where inputs stay as they are, and where they are quantized
    "fast": ("gptq", "gptq"),
    "good": ("kron", "kron+smoothquant+rotation"),
    "best": ("kron+mixed+tuned", "kron+smoothquant+rotation+mixed+tuned"),
}
GROUPED, PLAIN = "good-w4a16-g64", "good-w4a16"  # what is done where nobody names a recipe, see ``api.plan``
_NAME = re.compile(rf"({'|'.join(LADDER)})((?:\+[^-]*)?-w\d+a(\d+).*)")


def stands_for(name: str) -> str:
    """The recipe that a name stands for; a name that is no rung of the ladder stands for itself.

    Args:
        name: Of a recipe, perhaps with ingredients of its own: ``good+embeddings-w4a16``.

    Examples:
        >>> from mlxquant.recipes.ladder import stands_for
        >>> stands_for("fast-w4a8")
        'gptq-w4a8'
    """
    if (found := _NAME.fullmatch(name)) is None:
        return name
    plain, with_inputs = LADDER[found[1]]
    return (plain if found[3] == "16" else with_inputs) + found[2]


def explained(name: str) -> str | None:
    """A line that says what a name stands for; None where it stands for itself."""
    return None if (recipe := stands_for(name)) == name else f"{name} is {recipe} in this release"
