"""The BLAS that an unfinished run computes with, so that its rest is computed with the same.

How many threads share a product or a decomposition decides its last bits, and those decide codes at ties: a run that
goes on in a shell with another OPENBLAS_NUM_THREADS would not end with the bytes of one that nothing stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from ..errors import LIMIT, shortened
from .checked import read_json, understood, write_json
from .lock import INSIDE
from .schema import anything, array_of, entries, whole

FILE, KIND = "blas.json", "blas"
LIBRARIES = array_of(
    entries({"threads": whole(1, 4096), **dict.fromkeys(("library", "version", "architecture"), anything)})
)
FACTS = {"library": "prefix", "version": "version", "architecture": "architecture", "threads": "num_threads"}
log = logging.getLogger(__name__)

Libraries = Sequence[dict[str, Any]]


def loaded_blas() -> list[dict[str, Any]]:
    """Every BLAS library of this process that can be asked (NumPy's and MLX's; Accelerate cannot): its ``library``
    name, ``version``, ``architecture`` of its kernels, and ``threads``.
    """
    found = ThreadpoolController().select(user_api="blas").info()
    facts = [{name: one.get(key) for name, key in FACTS.items()} for one in found]
    return sorted(facts, key=lambda one: (str(one["library"]), str(one["version"])))


@contextmanager
def same_blas(before: Libraries | None, where: Path) -> Iterator[None]:
    """Compute with as many threads as the run in ``where`` did ``before``, None: as it is. One line on the log says
    where this is another library, or one that does not take that many.
    """
    if before is None:
        yield
        return
    with understood(where, "remove it"):
        LIBRARIES(before, "it")
        threads = {str(one["library"]): one["threads"] for one in before}
    with ThreadpoolController().limit(limits=threads):
        if (now := loaded_blas()) != list(before):
            log.warning(
                "%s: was begun with %s, and goes on with %s; where two codes are equally good the other may be chosen",
                where, _words(before), _words(now),
            )  # fmt: skip
        yield


@contextmanager
def blas_kept_in(folder: Path) -> Iterator[None]:
    """As ``same_blas``, with what is recorded in the ``folder`` that keeps a run's progress. The first one records it,
    and takes it back where it fails before it has kept anything else.
    """
    path, before = folder / FILE, None
    if path.exists():
        facts = read_json(path, KIND)
        with understood(path, "remove it"):
            before = list(facts["libraries"])
    else:
        write_json(path, KIND, {"libraries": loaded_blas()})
    try:
        with same_blas(before, folder):
            yield
    except BaseException:
        if before is None and folder.exists() and {left.name for left in folder.iterdir()} <= {FILE, INSIDE}:
            path.unlink(missing_ok=True)
        raise


def _words(libraries: Libraries) -> str:
    told = " and ".join("{library} {version} ({architecture}, threads: {threads})".format(**one) for one in libraries)
    return shortened(told, LIMIT // 4) or "a BLAS that cannot be asked"
