"""What has to agree before a version goes out: its number, its tag, and the changelog.

``python .ci/check_release.py [TAG]``: without a tag, only that the changelog has a part for the version.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def problems(tag: str | None) -> list[str]:
    """What is wrong."""
    version: str = runpy.run_path(str(ROOT / "vtoken" / "_version.py"))["__version__"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## \[?{re.escape(version)}\]? \N{{EN DASH}} (.+)$", changelog, re.MULTILINE)
    found = []
    if heading is None:
        found.append(f"CHANGELOG.md has no heading '## {version} \N{EN DASH} date'")
    if tag is None:
        return found
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and vtoken/_version.py says {version}")
    if heading is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", heading[1]):
        found.append(f"CHANGELOG.md gives {version} no date, but {heading[1]!r}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1] if len(sys.argv) > 1 else None)) or None)
