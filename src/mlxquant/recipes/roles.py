"""Roles: what layers are for, so that recipes can treat them alike without naming them.

Five have a meaning in every recipe: "attention" and "mlp", and three that want care, because their error enters every
block at every step: "modulation", "embedder" and "output". Tables of embeddings have a role of their own, by which
recipes ask for them. An adapter may have any others, and says which of those want care.
"""

from __future__ import annotations

import re
from typing import Any, Self

from ..errors import AdapterError

CAREFUL = ("modulation", "embedder", "output")
EMBEDDING = "embedding"
ROLES = ("attention", "mlp", *CAREFUL, EMBEDDING)
_NAME = re.compile(r"[^\s=,@]+")


class Role(str):
    """A role by its name, which knows whether it is ``careful``: its layers get at least 8 bits, and nothing that
    changes or quantizes their input, unless a rule names them.
    """

    careful: bool

    def __new__(cls, name: str, careful: bool | None = None) -> Self:
        """A role.

        Args:
            name: Any word; an override names it as ``@name``.
            careful: Whether its layers want care; None for what the name says, which is no for one of an adapter's own.

        Raises:
            AdapterError: ``name`` is no text, or not one word; or it is one of ``ROLES``, and ``careful`` says
                something else of it than all recipes do.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterError(
                f"a role is one word without '=', ',' or '@', which an override names as '@word', found {name!r:.80}"
            )
        usual = name.careful if isinstance(name, Role) else name in CAREFUL
        if careful not in (None, usual) and name in ROLES:
            raise AdapterError(
                f"role {str(name)!r} {'wants' if usual else 'wants no'} care in every recipe; give these layers a role"
                " of another name"
            )
        self = super().__new__(cls, name)
        self.careful = usual if careful is None else careful
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.careful
