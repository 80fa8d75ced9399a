"""Code of mflux with other numbers in it: most of its widths are written out there, where no argument reaches them.

The source of a module is run again with its numbers replaced, and the functions of the module that everybody has
imported are given the new code. Classes, names, layouts and the order of operations stay mflux's own. A number that is
not found is an error: then mflux has changed.
"""

import pkgutil
import re
from contextlib import ExitStack, contextmanager
from importlib import import_module
from inspect import getsource
from types import FunctionType, ModuleType

PLAIN = (int, float, str, tuple, list, dict)


@contextmanager
def rewritten(edits):
    """Runs with the code of some modules rewritten, and puts their own code back.

    Args:
        edits: For each module, or package with all modules in it that have no entry of their own, what is written
            there, and what is to be written in its place. All replacements of a text are made at once.
    """
    with ExitStack() as undo:
        for name, numbers in edits.items():
            sources = [(module, getsource(module)) for module in _modules(name, edits)]
            found = {word for _, source in sources for word in numbers if _pattern([word]).search(source)}
            if missing := set(numbers) - found:
                raise AssertionError(f"{name}: found no {sorted(missing)}; has mflux changed?")
            for module, source in sources:
                if (new := _pattern(numbers).sub(lambda match: numbers[match.group()], source)) != source:  # noqa: B023
                    _replace(module, new, undo)
        yield


def _modules(name, edits):
    module = import_module(name)
    if not hasattr(module, "__path__"):
        return [module]
    within = [found.name for found in pkgutil.walk_packages(module.__path__, f"{name}.") if not found.ispkg]
    return [import_module(found) for found in within if found not in edits]


def _pattern(words):
    return re.compile("|".join(rf"(?<![\w.]){re.escape(word)}(?![\w.])" for word in words))


def _replace(module: ModuleType, source, undo):
    """Gives the functions and constants of a module those that another source of it makes."""
    fresh = {"__name__": module.__name__, "__file__": module.__file__, "__package__": module.__package__}
    exec(compile(source, module.__file__, "exec"), fresh)
    own = {name: new for name, new in fresh.items() if _is_made_in(module, new)}
    _replace_members(module, own, undo)


def _is_made_in(module, value):
    return isinstance(value, PLAIN) or getattr(value, "__module__", None) == module.__name__


def _replace_members(old, new, undo):
    """Goes through what a module, or a class, has made anew."""
    for name, member in new.items():
        before = vars(old)[name] if not name.startswith("__") or callable(member) else None
        if isinstance(member, type):
            _replace_members(before, vars(member), undo)
        elif isinstance(member, staticmethod | classmethod):
            _replace_code(before.__func__, member.__func__, undo)
        elif isinstance(member, FunctionType):
            _replace_code(before, member, undo)
        elif isinstance(member, PLAIN) and not name.startswith("__") and member != before:
            setattr(old, name, member)
            undo.callback(setattr, old, name, before)


def _replace_code(old, new, undo):
    for part in ("__code__", "__defaults__", "__kwdefaults__"):
        undo.callback(setattr, old, part, getattr(old, part))
        setattr(old, part, getattr(new, part))
