"""What the built packages hold: ``python .ci/contents.py DIST``.

The wheel has every file that is tracked in src/mlxquant, its own record, and nothing else; the sdist has the same and
what is needed to build it. A file that is added in a place or with an ending that no rule names stops here.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

RULES = {  # endings, and where in the package they may be
    ".py": "",
    ".typed": "",
    ".safetensors": "assets/",
    ".txt": "assets/",
    ".json": "assets/",
    ".css": "report/",
    ".html": "report/",
    ".js": "report/",
}
RECORD = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
BESIDE = {  # of the package, in the sdist
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"),
}


def tracked() -> set[str]:
    """Names in the package, as git has them."""
    listed = subprocess.run(["git", "ls-files", "src/mlxquant"], capture_output=True, text=True, check=True).stdout
    return {name.removeprefix("src/mlxquant/") for name in listed.splitlines()}


def main(dist: Path) -> None:
    package = tracked()
    unruled = {name for name in package if not name.startswith(RULES.get(Path(name).suffix, "no rule"))}
    assert not unruled, f"no rule of .ci/contents.py lets these into the package: {sorted(unruled)}"

    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    compare(wheel, names, {f"mlxquant/{name}" for name in package} | {f"{info}/{name}" for name in RECORD})

    (source,) = dist.glob("*.tar.gz")
    top = source.name.removesuffix(".tar.gz")
    with tarfile.open(source) as archive:
        names = {member.name for member in archive if member.isfile()}
    egg = {name for name in names if "/src/mlxquant.egg-info/" in name}
    expected = {f"src/mlxquant/{name}" for name in package} | BESIDE
    compare(source, names - egg, {f"{top}/{name}" for name in expected})


def compare(path: Path, found: set[str], expected: set[str]) -> None:
    """Raise when an archive holds other names than it must."""
    assert found == expected, (
        f"{path.name} lacks {sorted(expected - found)} and has {sorted(found - expected)} beside what it must"
    )
    print(f"{path.name}: {len(found)} files, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
