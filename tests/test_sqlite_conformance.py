from __future__ import annotations

from pathlib import Path

from vtoken.backend import TokenBackend
from vtoken.testing import DurableBackendConformance
from vtoken_backends.sqlite import SQLiteBackend


class TestSQLite(DurableBackendConformance):
    def new_store(self, directory: Path) -> str:
        return f"sqlite:///{directory}/tokens.db"

    def backend(self, store: str) -> TokenBackend:
        return SQLiteBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        file = Path(store.removeprefix("sqlite:///"))
        return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))
