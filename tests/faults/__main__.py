"""The proof of the guarantees under faults: ``python -m tests.faults [--long] [NAME ...]``.

Every round prints what it did and how often its fault fired, and fails on the first violation. The short
tier is what the test suite runs, too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final

ROUNDS: Final = {
    "histories-sqlite": "tests.faults.histories:on_sqlite",
    "histories-mongodb": "tests.faults.histories:on_mongodb",
    "cancellation": "tests.faults.cancellation:everywhere",
    "sqlite-crash": "tests.faults.sqlite_rounds:crash",
    "sqlite-errors": "tests.faults.sqlite_rounds:errors",
    "sqlite-power": "tests.faults.sqlite_rounds:power_loss",
    "sqlite-life": "tests.faults.sqlite_life:opens_and_closes",
    "sqlite-load": "tests.faults.sqlite_load:load",
    "copy": "tests.faults.copy_round:there_and_back",
    "postgresql-crash": "tests.faults.postgresql_rounds:crash",
    "postgresql-failover": "tests.faults.postgresql_rounds:failover",
    "mongodb-crash": "tests.faults.mongodb_rounds:crash",
    "mongodb-failover": "tests.faults.mongodb_rounds:failover",
    "mongodb-rollback": "tests.faults.mongodb_rounds:rollback",
    "mongodb-lost-reply": "tests.faults.mongodb_replies:lost",
}
"""For each round a function ``(long: bool) -> None``: prints its figures, raises on a violation."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Proof under faults.")
    parser.add_argument("--long", action="store_true", help="the long tier: minutes instead of seconds")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROUNDS)}; all by default")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - ROUNDS.keys()
    if unknown:
        parser.error(f"there is no round {', '.join(sorted(unknown))}")
    failed: list[str] = []
    for name in arguments.names or ROUNDS:
        print(f"== {name}", flush=True)
        module, _, function = ROUNDS[name].partition(":")
        run: Callable[[bool], None] = getattr(importlib.import_module(module), function)
        started = time.monotonic()
        try:
            run(arguments.long)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
