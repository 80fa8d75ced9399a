"""For ``api.md``: ``mlxquant.quantize`` is the function that the package exports, not the verb's module of that
name.
"""

import griffe


class PublicNames(griffe.Extension):
    """The package is read, not imported. Then a submodule hides what ``__init__`` imports under its name; undo that."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        for name, target in pkg.imports.items():
            member = pkg.members.get(name)
            if member is not None and not member.is_alias and member.is_module:  # hides what was imported
                pkg.members[name] = griffe.Alias(name, pkg[target.removeprefix(f"{pkg.path}.")], parent=pkg)
