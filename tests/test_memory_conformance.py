from __future__ import annotations

from itertools import count
from pathlib import Path

from vtoken.backend import TokenBackend
from vtoken.testing import BackendConformance
from vtoken_backends import memory

_numbers = count()


class TestMemory(BackendConformance):
    def new_store(self, directory: Path) -> str:
        return f"memory://conformance-{next(_numbers)}"

    def backend(self, store: str) -> TokenBackend:
        return memory.MemoryBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        # No public way leads past the backend's own methods, and a probe must not use those.
        records = memory._named_stores[store.removeprefix("memory://")].tokens.values()  # pyright: ignore[reportPrivateUsage]  # past the protocol
        return repr([([*record], [[*key] for key in record.keys]) for record in records]).encode()
