"""The conformance suite for authors of a backend.

A subclass of three short methods gets every guarantee as a test::

    class TestMine(DurableBackendConformance):
        def new_store(self, directory: Path) -> str:
            return f"mine:///{directory}/tokens"

        def backend(self, store: str) -> TokenBackend:
            return MyBackend.from_url(store)

        def raw(self, store: str) -> bytes:
            return Path(store.removeprefix("mine:///")).read_bytes()

``vtoken.testing.model`` (which needs ``hypothesis``) holds a backend against a model, with random histories.

The tests are plain synchronous methods that run their own event loops: any pytest will do, whatever plugins
it has, and so will a loop over :meth:`BackendConformance.cases` without pytest.
"""

from contextlib import suppress

with suppress(ModuleNotFoundError):
    import pytest

    # Before the cases are imported: else a failed one would show its line and no values.
    pytest.register_assert_rewrite(
        "vtoken.testing._bench",
        "vtoken.testing._budget",
        "vtoken.testing._change",
        "vtoken.testing._durable",
        "vtoken.testing._find",
        "vtoken.testing._insert",
        "vtoken.testing._life",
        "vtoken.testing._limits",
        "vtoken.testing._matching",
        "vtoken.testing._once",
        "vtoken.testing._redeem",
        "vtoken.testing._suite",
        "vtoken.testing._sweep",
        "vtoken.testing._machine",
    )

from vtoken.testing._bench import Case, Clock
from vtoken.testing._durable import DurableBackendConformance
from vtoken.testing._suite import BackendConformance

__all__ = ["BackendConformance", "Case", "Clock", "DurableBackendConformance"]
