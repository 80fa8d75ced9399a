"""Import every module of the installed package, where nothing is installed but what it depends on.

What needs an extra asks for it when it is used. Refuses a package that is not in site-packages.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages

import mlxquant

ROOT = Path(mlxquant.__file__).parent

assert ROOT.parent.name == "site-packages", f"the wheel should be what is imported, but it is {ROOT}"
names = [module.name for module in walk_packages([str(ROOT)], "mlxquant.") if not module.name.endswith("__main__")]
for name in names:
    import_module(name)
assert "torch" not in sys.modules
print(f"mlxquant {version('mlxquant')}: {len(names)} modules import")
