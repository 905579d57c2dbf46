"""SQLite: operations that share a batch come to what they would have come to one by one."""

# pyright: reportPrivateUsage=false
# What SQLite says when there is no memory left has to be said for it.

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from vtoken.backend import (
    NEVER,
    Budget,
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Spend,
    StoredToken,
    Use,
)
from vtoken.errors import BackendError, BackendUnavailable, CorruptStore
from vtoken_backends.sqlite import SQLiteBackend, operations
from vtoken_backends.sqlite.batch import Batch, SingleOperation
from vtoken_backends.sqlite.steps import Rows, Steps

from .sqlite_tools import NOW, ask, digest, insert, key, opened, plain, present, subject, token, use

INSERTED = InsertResult.INSERTED
REPLACE = InsertMode.REPLACE
Operation = Callable[[], Coroutine[Any, Any, object]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


async def test_issues_uses_and_look_ups_of_many_share_a_batch(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        tokens = [token(n, str(n)) for n in range(50)]
        assert await asyncio.gather(*(insert(backend, t, REPLACE) for t in tokens)) == [INSERTED] * 50
        found = await asyncio.gather(*(backend.find(present(n, str(n)), 1) for n in range(60)))
        assert found == [[t] for t in tokens] + [[]] * 10
        used = await asyncio.gather(*(use(backend, present(n, str(n))) for n in range(60)))
        assert [t is not None and t.uses == 1 and not t.is_active for t in used] == [True] * 50 + [False] * 10
        assert await asyncio.gather(*(use(backend, present(n, str(n))) for n in range(50))) == [None] * 50


async def test_of_uses_of_one_key_in_one_batch_one_wins(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1), REPLACE)
        await insert(backend, token(2, "2"), REPLACE)
        uses = [use(backend, present(1, None), use_id=f"{n:032x}") for n in range(20)]
        uses += [use(backend, present(2, "2")) for _ in range(20)]
        answers = await asyncio.gather(*uses)
        assert [answer is not None for answer in answers] == ([True] + [False] * 19) * 2


async def test_of_two_overlapping_keys_in_one_batch_one_is_used(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1), REPLACE)
        await insert(backend, token(2), REPLACE, NOW + 500)
        answers = await asyncio.gather(*(use(backend, present(n, None)) for n in (1, 2)))
        assert [answer and answer.id for answer in answers] == [token(2).id, None]
        assert await backend.find(subject(), 9) == []


async def test_an_older_secrets_digest_is_found_in_a_batch(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(*(insert(backend, token(n, str(n))) for n in range(10)))
        asked = [present(n, str(n))._replace(digests=(digest(n + 1000), digest(n))) for n in range(10)]
        assert [len(f) for f in await asyncio.gather(*(backend.find(m, 2) for m in asked))] == [1] * 10
        used = await asyncio.gather(*(use(backend, m) for m in asked))
        assert [t and t.keys[0].digest for t in used] == [digest(n) for n in range(10)]


async def test_several_uses_and_their_ids_in_a_batch(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1)._replace(max_uses=3))
        changes = [Use(at=NOW + n, use_id=use_id) for n, use_id in enumerate("aabcda")]
        answers = await asyncio.gather(*(backend.present(present(1), c, c.at) for c in changes))
        assert [(a.outcome, a.used_at) for a in answers] == [
            (Outcome.RIGHT, 0),
            (Outcome.REPLAYED, NOW),
            (Outcome.RIGHT, 0),
            (Outcome.RIGHT, 0),
            (Outcome.REFUSED, 0),
            (Outcome.REPLAYED, NOW),
        ]


async def test_in_company_a_token_comes_back_to_the_letter(path: Path) -> None:
    numbers = '{"a":[1e300,-9223372036854775808,"\\u0000"]}'
    odd = "\\ \" ' \u2028 \u00e9\U0001f511 \n\t\x7f [1]"
    tokens = [
        token(n, odd)._replace(
            slug=odd,
            context=bytes(range(256)),
            extra_data=extra_data,
            expires_at=NEVER,
            ends_at=NEVER,
            max_uses=2**31 - 1,
            uses=1,
            used_at=1,
            keys=tuple(
                key(10 * n + more, token(n).id, NEVER)._replace(
                    scheme=odd, secret_id=odd, plain_key=odd, nonce=odd
                )
                for more in range(2)
            ),
        )
        for n, extra_data in enumerate([None, "null", "{}", numbers, odd])
    ]
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(*(insert(backend, t) for t in tokens))
        matches = [Match(digests=(t.keys[1].digest,)) for t in tokens]
        assert await asyncio.gather(*(backend.find(m, 1) for m in matches)) == [[t] for t in tokens]
        used = await asyncio.gather(*(use(backend, m, use_id="id") for m in matches))
        assert used == [t._replace(uses=2, used_at=NOW) for t in tokens]
        assert [await backend.find(m, 1) for m in matches] == [[t] for t in used]


async def test_a_use_beside_a_damaged_row_is_answered(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(*(insert(backend, token(n)._replace(max_uses=2)) for n in range(4)))
        with plain(path) as database:
            database.execute("UPDATE vtoken_tokens SET extra_data = CAST(x'ff' AS TEXT) WHERE id = 2")
        uses = [use(backend, present(n)) for n in range(4)]
        answers = await asyncio.gather(*uses, return_exceptions=True)
        assert isinstance(answers.pop(2), CorruptStore)
        assert [a.uses if isinstance(a, StoredToken) else a for a in answers] == [1, 1, 1]
        with plain(path) as database:
            assert database.execute("SELECT uses FROM vtoken_tokens ORDER BY id").fetchall() == [(1,)] * 4
        found = await asyncio.gather(*(backend.find(present(n), 1) for n in range(4)), return_exceptions=True)
        assert [type(answer) for answer in found] == [list, list, CorruptStore, list]


async def test_a_digest_asked_for_twice_is_found_once(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1))
        twice = Match(digests=(digest(1), digest(1)))
        found = await asyncio.gather(*(backend.find(twice, 2) for _ in range(3)))
        assert found == [[token(1)]] * 3


async def test_a_commit_without_memory_is_told_and_undone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starving(batch: Batch, sql: str, values: Sequence[Any] = ()) -> Rows:
        if sql == "COMMIT":
            raise MemoryError  # as sqlite3 says SQLITE_NOMEM
        return execute(batch, sql, values)

    execute = Batch._execute
    async with opened(SQLiteBackend(path)) as backend:
        monkeypatch.setattr(Batch, "_execute", starving)
        writes: list[Coroutine[Any, Any, object]] = [insert(backend, token(1))]
        writes += [insert(backend, token(2)), backend.deactivate(subject("3"), NOW)]
        first, *answers = await asyncio.gather(*writes, return_exceptions=True)
        assert first is INSERTED  # alone, without a transaction of its own
        assert [type(answer) for answer in answers] == [BackendError, BackendError]
        monkeypatch.setattr(Batch, "_execute", execute)
        await insert(backend, token(4))
        with plain(path) as database:
            found = database.execute("SELECT digest FROM vtoken_keys ORDER BY token").fetchall()
            assert found == [(digest(1),), (digest(4),)]


async def test_a_look_up_in_company_minds_every_condition(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        stored = token(1)._replace(context=b"browser")
        await insert(backend, stored)
        base = Match(digests=(digest(1),))
        fits = [
            base,
            base._replace(
                content_type="auth.user", object_id="1", slug="reset", context=b"browser", active=True
            ),
            base._replace(kind="link"),
            base._replace(valid_at=NOW + 1000),
            base._replace(id=stored.id),
            Match(id=stored.id),
        ]
        misses = [
            base._replace(content_type="auth.group"),
            base._replace(object_id="2"),
            base._replace(slug=""),
            base._replace(context=b""),
            base._replace(kind="code"),
            base._replace(valid_at=NOW + 1001),  # expired
            base._replace(digests=()),
            base._replace(id=token(2).id),
        ]
        found = await asyncio.gather(*(backend.find(match, 5) for match in (*fits, *misses)))
        assert found == [[stored]] * len(fits) + [[]] * len(misses)
        alone = [await backend.find(match, 5) for match in (*fits, *misses)]
        assert alone == found


async def test_budgets_holds_and_purges_ride_along(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        budget = Budget(object=b"o" * 16, name=b"n" * 16)
        spend = Spend(budget=budget, limit=3, window=100, max_window=1000)
        await insert(backend, token(1))
        await insert(backend, token(2, "2", created_at=NOW - 5000))
        spendings, held, used, purged = await asyncio.gather(
            asyncio.gather(*(backend.spend((spend,), NOW) for _ in range(10))),
            backend.present(present(1), Hold(hold_id="mine", until=NOW + 10), NOW),
            backend.present(present(1), Use(at=NOW), NOW),
            backend.purge(NOW, NOW, 10, NOW - 1),
        )
        assert [s.full for s in spendings] == [None] * 3 + [0] * 7
        assert {held.outcome, used.outcome} == {Outcome.RIGHT, Outcome.REFUSED}  # in either order
        assert purged.tokens == 1


async def test_a_neighbour_that_fails_harms_nobody(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        too_late = token(3, "3")._replace(expires_at=2**70)  # no integer for SQLite
        tokens = [token(1), too_late, token(2, "2"), token(4, "4")]
        first, failed, *others = await asyncio.gather(
            *(insert(backend, t, REPLACE) for t in tokens), return_exceptions=True
        )
        assert first is INSERTED
        assert isinstance(failed, BackendError)
        assert others == [INSERTED, INSERTED]


def big(number: int) -> StoredToken:
    return token(number, str(number))._replace(extra_data='"' + "x" * 9000 + '"')


async def test_without_room_reads_go_on_and_each_write_is_told(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1), REPLACE)
        await ask(backend, "PRAGMA max_page_count = 1")  # SQLite takes what there is
        work: list[Coroutine[Any, Any, object]] = [backend.find(present(1), 1)]
        work += [insert(backend, big(n), REPLACE) for n in range(10, 20)]
        answers = await asyncio.gather(*work, return_exceptions=True)
        assert answers[0] == [token(1)]
        assert [type(answer) for answer in answers[1:]] == [BackendUnavailable] * 10
        await ask(backend, "PRAGMA max_page_count = 100000")
        inserts = (insert(backend, big(n), REPLACE) for n in range(10, 20))
        assert await asyncio.gather(*inserts) == [INSERTED] * 10
    with plain(path) as database:
        assert database.execute("SELECT count(*) FROM vtoken_tokens").fetchone() == (11,)


async def test_what_was_undone_with_its_neighbours_is_done_again_alone(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1), REPLACE)
        await ask(backend, "PRAGMA max_page_count = 1")  # SQLite takes what there is
        used, *refused = await asyncio.gather(
            use(backend, present(1)),
            *(insert(backend, big(n), REPLACE) for n in range(10, 12)),
            return_exceptions=True,
        )
        assert isinstance(used, StoredToken)
        assert [type(answer) for answer in refused] == [BackendUnavailable] * 2
        assert await backend.find(Match(id=token(1).id), 1) == [used]


async def test_behind_a_foreign_lock_reads_go_on(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=600_000)) as backend:
        await insert(backend, token(1), REPLACE)
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            blocked = asyncio.gather(*(use(backend, present(1)) for _ in range(5)))
            async with asyncio.timeout(60):  # none of these waits for the lock
                assert await backend.find(present(1), 1) == [token(1)]
                assert await backend.find(Match(), 9) == [token(1)]
                assert (await backend.count(NOW))[0].active == 1
                await backend.ping()
            assert not blocked.done()
            database.execute("ROLLBACK")
        assert [answer is not None for answer in await blocked] == [True] + [False] * 4


async def test_a_foreign_lock_that_stays_is_told_to_each(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=1)) as backend:
        await insert(backend, token(1), REPLACE)
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            writes: list[Coroutine[Any, Any, object]] = [insert(backend, token(2, "2"), REPLACE)]
            writes += [use(backend, present(1)) for _ in range(5)]
            answers = await asyncio.gather(*writes, return_exceptions=True)
            database.execute("ROLLBACK")
        assert [type(answer) for answer in answers] == [BackendUnavailable] * 6
        assert await use(backend, present(1)) is not None


@pytest.mark.parametrize("size", [2, 3, 255, 256, 257, 600])
async def test_batches_of_every_size(path: Path, size: int) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        tokens = [token(n, str(n)) for n in range(size)]
        assert await asyncio.gather(*(insert(backend, t, REPLACE) for t in tokens)) == [INSERTED] * size
        used = await asyncio.gather(*(use(backend, present(n, str(n))) for n in range(size)))
        assert [t and t.id for t in used] == [t.id for t in tokens]


async def test_what_a_rollback_has_undone_in_memory_is_made_again(path: Path) -> None:
    """The views and triggers of the shared statements go with a transaction that fails."""
    async with opened(SQLiteBackend(path)) as backend:
        await ask(backend, "PRAGMA max_page_count = 1")
        results = await asyncio.gather(
            *(insert(backend, big(n), REPLACE) for n in range(10, 13)),
            backend.deactivate(subject(), NOW),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [*[BackendUnavailable] * 3, int]
        await ask(backend, "PRAGMA max_page_count = 100000")
        assert await insert(backend, big(10), REPLACE) is INSERTED
        assert await insert(backend, big(11), REPLACE) is INSERTED


async def test_only_the_last_thousand_use_ids_or_more_are_remembered(path: Path) -> None:
    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:
        await insert(backend, token(1)._replace(max_uses=None))
        for first in range(0, 3500, 500):
            uses = (use(backend, present(1), use_id=str(n)) for n in range(first, first + 500))
            assert None not in await asyncio.gather(*uses)
        with plain(path) as database:
            [(stored,)] = database.execute("SELECT count(*) FROM vtoken_receipts").fetchall()
        assert 1000 <= stored <= 2000
        again = await asyncio.gather(
            *(backend.present(present(1), Use(at=NOW, use_id=str(n)), NOW) for n in range(2500, 3500))
        )
        assert {answer.outcome for answer in again} == {Outcome.REPLAYED}
        assert (await backend.erase("auth.user", "1", b"o" * 16)) == 1
        with plain(path) as database:
            assert database.execute("SELECT * FROM vtoken_receipts").fetchall() == []
            assert database.execute("SELECT * FROM vtoken_keys").fetchall() == []


async def test_cancelled_behind_a_foreign_lock_one_leaves_at_once_and_its_neighbours_go_on(
    path: Path,
) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=600_000)) as backend:
        await asyncio.gather(*(insert(backend, token(n, str(n))) for n in range(6)))
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            tasks = [asyncio.create_task(use(backend, present(n, str(n)))) for n in range(6)]
            for _ in range(5):  # by then they share a batch
                await asyncio.sleep(0)
            async with asyncio.timeout(60):  # and not as long as the lock is waited for
                for number in (0, 3, 5):
                    tasks[number].cancel()
                    await asyncio.wait([tasks[number]])
            assert [task.done() for task in tasks] == [True, False, False, True, False, True]
            database.execute("ROLLBACK")
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, StoredToken) for answer in answers] == [
            False,
            True,
            True,
            False,
            True,
            False,
        ]
        found = [(await backend.find(Match(id=token(n).id), 1))[0].uses for n in range(6)]
        assert found == [0, 1, 1, 0, 1, 0]


async def test_when_all_have_left_nobody_waits_for_the_lock(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=600_000)) as backend:
        await insert(backend, token(1))
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            tasks = [asyncio.create_task(use(backend, present(1))) for _ in range(3)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            async with asyncio.timeout(60):
                await asyncio.wait(tasks)
                await ask(backend, "PRAGMA user_version")  # the thread is free again
            database.execute("ROLLBACK")
        assert (await backend.find(present(1), 1))[0].uses == 0


def test_what_is_withdrawn_while_it_is_tried_is_not_tried_again() -> None:
    tries: list[bool] = []

    def locked() -> Steps[str]:
        tries.append(batch.withdraw(operation))
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error
        yield  # makes it a generator

    operation = SingleOperation(locked)
    batch = Batch([operation], busy_timeout=600_000)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        assert batch.carry_out(database).answers == [None]
    assert tries == [False]


def test_what_has_begun_cannot_be_withdrawn() -> None:
    operation = SingleOperation(lambda: operations.read_note("name"))
    batch = Batch([operation], 0)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.execute("CREATE TABLE vtoken_notes (name, text)")
        assert batch.carry_out(database).answers == [""]
    assert not batch.withdraw(operation)
