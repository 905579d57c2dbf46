"""Every guarantee of vtoken as a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vtoken.backend import TokenBackend
from vtoken.testing import DurableBackendConformance

from servers import DECLARED_URL, contents, fresh_store
from vtoken_valkey import ValkeyBackend


class TestValkey(DurableBackendConformance):
    _url = os.environ.get(DECLARED_URL, "")  # without pytest, by `vtoken conformance`: no fixture

    @pytest.fixture(autouse=True)
    def _server(self, server_url: str) -> None:
        self._url = server_url

    def new_store(self, directory: Path) -> str:
        return fresh_store(self._url)

    def backend(self, store: str) -> TokenBackend:
        return ValkeyBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        return contents(store)
