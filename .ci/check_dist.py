"""Look into the wheel and the sdist of a folder: all that belongs there, and nothing else."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

_DEAD_LINK = re.compile(r"\]\((?![a-z]+:|#)[^)]*\)")  # relative to a repository, which a package index is not


def problems(folder: Path) -> list[str]:
    """What is wrong with the wheel and the sdist in ``folder``."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}

    found = []
    tops = {name.split("/")[0] for name in names}
    if tops != {"vtoken", "vtoken_backends", info}:
        found.append(f"the wheel's top level is {sorted(tops)}")
    found += [
        f"the wheel has no {name}"
        for name in ("vtoken/py.typed", "vtoken_backends/py.typed", f"{info}/licenses/LICENSE")
        if name not in names
    ]
    found += [
        f"the wheel has {name}" for name in names if not name.endswith((".py", ".typed")) and info not in name
    ]
    command = "vtoken = vtoken.__main__:main"
    found += [] if command in entry_points.splitlines() else [f"no entry point {command!r}"]
    found += [
        f"the metadata has no line {line!r}"
        for line in (
            "Name: vtoken",
            "License-Expression: MIT",
            "Requires-Python: >=3.11",
            "Provides-Extra: cli",
            "Provides-Extra: postgresql",
        )
        if line not in metadata.splitlines()
    ]
    found += [f"the long description has the dead link {link}" for link in _DEAD_LINK.findall(metadata)]
    found += [
        f"the sdist has no {name}"
        for name in ("LICENSE", "README.md", "pyproject.toml", "tests/conftest.py", "docs/security.md")
        if name not in sources
    ]
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    sys.exit("\n".join(wrong) or None)
