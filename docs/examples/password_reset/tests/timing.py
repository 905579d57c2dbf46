"""How long the answer to "forgot your password?" takes for addresses with an account and without one::

    python -m tests.timing [URL OF A STORE]

Each address is asked for once, in random order, over HTTP on this machine. A two-sample Kolmogorov-Smirnov
test says whether the two distributions of times can be told apart, and whether it would tell one that is
planted: a fifth more.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from time import perf_counter

import httpx

from password_reset import app, passwords
from password_reset.accounts import Change, open_accounts
from password_reset.tokens import POLICIES
from tests.site import Site

COUNT = 2_000
CRITICAL = 1.36 * sqrt(2 / COUNT)
"""Of the largest distance of two samples of this size, at a level of 5 % (Smirnov, 1948)."""


async def _add_accounts(url: str, emails: Iterable[str]) -> None:
    async def add(change: Change) -> None:
        for email in emails:
            await change.add(email, passwords.NOBODYS)

    accounts = await open_accounts(url)
    await accounts.in_transaction(add)
    await accounts.close()


def distance(first: list[float], second: list[float]) -> float:
    """The largest distance between two empirical distributions."""
    marked = sorted([(t, 1 / len(first)) for t in first] + [(t, -1 / len(second)) for t in second])
    height = furthest = 0.0
    for _, step in marked:
        height += step
        furthest = max(furthest, abs(height))
    return furthest


def measure(url: str) -> tuple[list[float], list[float]]:
    """Seconds of the answers for addresses with an account, and of those without."""
    known = [f"known-{number:04}@example.org" for number in range(COUNT)]
    unknown = [f"nobody-{number:04}@example.org" for number in range(COUNT)]
    # All requests come from one address here; its own limit is not what is measured.
    unlimited = tuple(replace(policy, issue_limits=(), attempt_limits=()) for policy in POLICIES)
    vars(app)["POLICIES"] = unlimited
    with tempfile.TemporaryDirectory() as folder:
        store = url or f"sqlite:///{folder}/app.db?shared=true"
        times: dict[str, float] = {}
        with (
            Site(Path(folder), store) as site,
            httpx.Client(base_url=site.url, trust_env=False) as client,
        ):
            asyncio.run(_add_accounts(store, known))
            csrf = client.get("/forgot").text.partition('name="csrf" value="')[2].partition('"')[0]
            order = [*known, *unknown]
            random.shuffle(order)
            for email in order:
                started = perf_counter()
                answer = client.post("/forgot", data={"csrf": csrf, "email": email})
                times[email] = perf_counter() - started
                assert answer.status_code == 200, answer.text
    return [times[email] for email in known], [times[email] for email in unknown]


def main() -> None:
    """Measure, and say what was found."""
    known, unknown = measure(sys.argv[1] if len(sys.argv) > 1 else "")
    planted = [seconds * 1.2 for seconds in unknown]
    print(f"{COUNT} requests each, critical distance {CRITICAL:.3f}")
    medians = [sorted(times)[COUNT // 2] * 1e3 for times in (known, unknown)]
    print(f"medians: {medians[0]:.2f} ms with an account, {medians[1]:.2f} ms without")
    print(f"with and without an account: {distance(known, unknown):.3f}")
    print(f"a fifth more, planted: {distance(known, planted):.3f}")


if __name__ == "__main__":
    main()
