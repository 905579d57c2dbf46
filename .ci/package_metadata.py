"""What the package says of itself that depends on where its repository is: long description and addresses.

The README's links are relative, so that they work in a clone. On a package index they would lead nowhere.
Where the repository's address is known (a workflow knows it), they become links to the files of this version.
Where it isn't, their text stays and the link goes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")


def repository() -> str | None:
    """Where the repository is, e.g. ``https://example.org/owner/vtoken``, if the environment says so."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else None


def long_description(readme: str, home: str | None, version: str) -> str:
    """The README as a package index can show it."""
    if home is None:
        return _RELATIVE_LINK.sub(r"\g<text>", readme)
    return _RELATIVE_LINK.sub(rf"[\g<text>]({home}/blob/v{version}/\g<target>)", readme)


class Metadata(MetadataHookInterface):
    """Called by the build backend."""

    def update(self, metadata: dict[str, Any]) -> None:
        home = repository()
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(readme, home, str(metadata["version"])),
        }
        metadata["urls"] = {}
        if home is not None:
            changes = f"{home}/blob/v{metadata['version']}/CHANGELOG.md"
            metadata["urls"] = {"Source": home, "Issues": f"{home}/issues", "Changelog": changes}
