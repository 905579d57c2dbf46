"""A backend against a model: random histories of the manager's operations, any divergence fails.

A subclass of two short methods is the whole test; it needs ``hypothesis`` and no plugin::

    class TestMineAgainstTheModel(BackendModel):
        def new_store(self, directory: Path) -> str:
            return f"mine:///{directory}/tokens"

        def backend(self, store: str) -> TokenBackend:
            return MyBackend.from_url(store)
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from vtoken.backend import TokenBackend


class BackendModel(ABC):
    """Holds a backend against a small model of the contract, operation by operation.

    The first divergence in a result, an error or what is stored fails, with a short history that shows it.
    ``VTOKEN_TEST_EXAMPLES`` in the environment asks for so many histories, different ones each time;
    without it they are the same in every run.
    """

    examples: ClassVar[int] = 200
    """How many histories are played."""
    steps: ClassVar[int] = 25
    """How many operations a history has at most."""

    @abstractmethod
    def new_store(self, directory: Path) -> str:
        """Name a fresh, empty store, by a URL or whatever else :meth:`backend` understands.

        Args:
            directory: an empty directory of this history's own, for a store that lives in files.
        """

    @abstractmethod
    def backend(self, store: str) -> TokenBackend:
        """Make a new backend on that store, not yet open. Called twice for one store."""

    def test_the_backend_follows_the_model(self, tmp_path: Path) -> None:
        """Every operation does what the model of the contract says."""
        self.play(tmp_path)

    def play(self, directory: Path, **settings: Any) -> None:
        """Play the histories.

        Args:
            directory: an empty directory.
            **settings: of Hypothesis, to be changed.

        Raises:
            AssertionError: the backend and the model diverged; its notes show the history.
        """
        # Here, so that the parts of this package that need no Hypothesis can be imported without it.
        import hypothesis
        from hypothesis.stateful import run_state_machine_as_test

        from vtoken.testing.model.machine import Machine

        asked = os.environ.get("VTOKEN_TEST_EXAMPLES")
        chosen: dict[str, Any] = {
            "max_examples": int(asked or self.examples),
            "stateful_step_count": self.steps,
            "derandomize": asked is None,
            "deadline": None,
            "report_multiple_bugs": False,
            "suppress_health_check": list(hypothesis.HealthCheck),
            **settings,
        }
        numbers = itertools.count()
        suite = self

        class Tokens(Machine):
            def __init__(self) -> None:
                own = directory / str(next(numbers))
                own.mkdir(parents=True)
                store = suite.new_store(own)
                super().__init__(lambda: suite.backend(store))

        run_state_machine_as_test(Tokens, settings=hypothesis.settings(**chosen))
