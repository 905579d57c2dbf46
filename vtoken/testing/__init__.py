"""The conformance suite for authors of a backend, and help for applications' own tests.

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

An application's tests take :func:`memory_manager`: a manager in memory, with a :class:`Clock` to turn.
"""

import sys
from pkgutil import iter_modules

if "pytest" in sys.modules:
    import pytest

    # Before the cases are imported: else a failed one would show its line and no values.
    pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))

from vtoken.testing.applications import memory_manager
from vtoken.testing.clock import Clock
from vtoken.testing.harness import Case
from vtoken.testing.suite import BackendConformance, DurableBackendConformance

__all__ = ["BackendConformance", "Case", "Clock", "DurableBackendConformance", "memory_manager"]
