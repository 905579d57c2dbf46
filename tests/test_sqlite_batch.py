"""SQLite: operations that share a trip come to what they would have come to one by one."""

# pyright: reportPrivateUsage=false
# What SQLite says when there is no memory left has to be said for it.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from vtoken.backend import NEVER, Budget, InsertMode, InsertResult, Lease, Match, StoredToken, Use
from vtoken.errors import BackendError, BackendUnavailable, CorruptStore
from vtoken_backends._sqlite_batch import Rows, _Trip
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_tools import NOW, ask, digest, opened, plain, subject, token

INSERTED = InsertResult.INSERTED
Operation = Callable[[], Coroutine[Any, Any, object]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


def valid(number: int, object_id: str | None = "1") -> Match:
    """What a request that presents the key of a token asks for."""
    return Match(
        digests=(digest(number),), content_type="auth.user", object_id=object_id, slug="reset", valid_at=NOW
    )


async def test_issues_uses_and_searches_of_many_share_a_trip(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        tokens = [token(n, str(n)) for n in range(50)]
        assert (
            await asyncio.gather(*(backend.insert(t, InsertMode.REPLACE) for t in tokens)) == [INSERTED] * 50
        )
        found = await asyncio.gather(*(backend.find(valid(n, str(n)), 1) for n in range(60)))
        assert found == [[t] for t in tokens] + [[]] * 10
        used = await asyncio.gather(*(backend.update(valid(n, str(n)), Use(NOW)) for n in range(60)))
        assert [t is not None and t.uses == 1 and not t.is_active for t in used] == [True] * 50 + [False] * 10
        again = await asyncio.gather(*(backend.update(valid(n, str(n)), Use(NOW)) for n in range(50)))
        assert again == [None] * 50


async def test_order_of_a_subject_is_kept_in_one_trip(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        issued, found, used, gone, late = await asyncio.gather(
            backend.insert(token(1), InsertMode.REPLACE),
            backend.find(valid(1), 1),
            backend.update(valid(1), Use(NOW)),
            backend.find(valid(1), 1),
            backend.update(valid(1), Use(NOW)),
        )
        assert issued is INSERTED
        assert found == [token(1)]
        assert used is not None
        assert gone == []
        assert late is None


async def test_of_uses_of_one_key_in_one_trip_one_wins(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1), InsertMode.REPLACE)
        await backend.insert(token(2, "2"), InsertMode.REPLACE)
        uses = [backend.update(valid(1, None), Use(NOW, f"{n:032x}")) for n in range(20)]
        uses += [backend.update(valid(2, "2"), Use(NOW)) for _ in range(20)]
        answers = await asyncio.gather(*uses)
        assert [answer is not None for answer in answers] == ([True] + [False] * 19) * 2


async def test_of_two_overlapping_tokens_in_one_trip_one_is_used(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1), InsertMode.REPLACE)
        await backend.insert(token(2), InsertMode.REPLACE, NOW + 500)
        # Without their object, so that nothing but the overlap connects them.
        uses = [backend.update(valid(n, None), Use(NOW)) for n in (1, 2)]
        answers = await asyncio.gather(*uses)
        assert [answer is not None for answer in answers] == [True, False]
        assert await backend.find(subject(), 9) == []


async def test_an_older_secrets_digest_is_found_in_a_shared_trip(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(*(backend.insert(token(n, str(n)), InsertMode.ADD) for n in range(10)))
        asked = [valid(n, str(n))._replace(digests=(digest(n + 1000), digest(n))) for n in range(10)]
        assert [len(f) for f in await asyncio.gather(*(backend.find(m, 2) for m in asked))] == [1] * 10
        used = await asyncio.gather(*(backend.update(m, Use(NOW)) for m in asked))
        assert [t is not None and t.digest for t in used] == [digest(n) for n in range(10)]


async def test_several_uses_and_their_ids_in_a_shared_trip(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1)._replace(max_uses=3), InsertMode.ADD)
        ids = ["a", "a", "b", "c", "d", "a"]
        answers = await asyncio.gather(*(backend.update(valid(1), Use(NOW, i)) for i in ids))
        assert [t.use_ids if t else None for t in answers] == [
            ("a",),
            None,
            ("a", "b"),
            ("a", "b", "c"),
            None,
            None,
        ]


async def test_in_company_a_token_comes_back_to_the_letter(path: Path) -> None:
    numbers = '{"a":[1e300,-9223372036854775808,"\\u0000"]}'
    odd = "\\ \" ' \u2028 \u00e9\U0001f511 \n\t\x7f [1]"
    tokens = [
        token(n, odd)._replace(
            slug=odd,
            scheme=odd,
            plain_key=odd,
            nonce=odd,
            context=bytes(range(256)),
            extra_data=extra_data,
            expires_at=NEVER,
            ends_at=NEVER,
            max_uses=2**31 - 1,
            use_ids=(odd,),
            uses=1,
            used_at=1,
        )
        for n, extra_data in enumerate([None, "null", "{}", numbers, odd])
    ]
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(*(backend.insert(t, InsertMode.ADD) for t in tokens))
        matches = [Match(digests=(t.digest,), valid_at=NOW) for t in tokens]
        assert await asyncio.gather(*(backend.find(m, 1) for m in matches)) == [[t] for t in tokens]
        used = await asyncio.gather(*(backend.update(m, Use(NOW, "id")) for m in matches))
        assert used == [t._replace(uses=2, used_at=NOW, use_ids=(odd, "id")) for t in tokens]
        assert [await backend.find(m, 1) for m in matches] == [[t] for t in used]


async def test_a_use_beside_a_damaged_row_is_answered(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await asyncio.gather(
            *(backend.insert(token(n)._replace(max_uses=2), InsertMode.ADD) for n in range(4))
        )
        with plain(path) as database:
            database.execute(
                "UPDATE tokens SET extra_data = CAST(x'ff' AS TEXT) WHERE digest = ?", (digest(2),)
            )
        uses = [backend.update(valid(n), Use(NOW)) for n in range(4)]
        answers = await asyncio.gather(*uses, return_exceptions=True)
        assert isinstance(answers.pop(2), CorruptStore)
        assert [a.uses if isinstance(a, StoredToken) else a for a in answers] == [1, 1, 1]
        with plain(path) as database:
            assert database.execute("SELECT uses FROM tokens ORDER BY id").fetchall() == [(1,)] * 4


async def test_a_digest_asked_for_twice_is_found_once(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1), InsertMode.ADD)
        twice = Match(digests=(digest(1), digest(1)))
        found = await asyncio.gather(*(backend.find(twice, 2) for _ in range(3)))
        assert found == [[token(1)]] * 3


async def test_a_commit_without_memory_is_told_and_undone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starving(trip: _Trip, sql: str, parameters: Sequence[Any] = ()) -> Rows:
        if sql == "COMMIT":
            raise MemoryError  # as sqlite3 says SQLITE_NOMEM
        return execute(trip, sql, parameters)

    execute = _Trip._execute
    async with opened(SQLiteBackend(path)) as backend:
        monkeypatch.setattr(_Trip, "_execute", starving)
        writes: list[Coroutine[Any, Any, object]] = [backend.insert(token(1), InsertMode.ADD)]
        writes += [backend.insert(token(2), InsertMode.ADD), backend.deactivate(subject("3"), NOW)]
        first, *answers = await asyncio.gather(*writes, return_exceptions=True)
        assert first is INSERTED  # alone, without a transaction of its own
        assert [type(answer) for answer in answers] == [BackendError, BackendError]
        monkeypatch.setattr(_Trip, "_execute", execute)
        await backend.insert(token(4), InsertMode.ADD)
        with plain(path) as database:
            found = database.execute("SELECT digest FROM tokens ORDER BY id").fetchall()
            assert found == [(digest(1),), (digest(4),)]


async def test_a_search_in_company_minds_every_condition(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        stored = token(1)._replace(context=b"browser", lease_id="x", lease_until=NOW + 10)
        await backend.insert(stored, InsertMode.ADD)
        base = Match(digests=(digest(1),))
        fits = [
            base,
            base._replace(
                content_type="auth.user", object_id="1", slug="reset", context=b"browser", active=True
            ),
            base._replace(valid_at=NOW + 10),
            base._replace(valid_at=NOW + 1000),
        ]
        misses = [
            base._replace(content_type="auth.group"),
            base._replace(object_id="2"),
            base._replace(slug=""),
            base._replace(context=b""),
            base._replace(valid_at=NOW),  # leased
            base._replace(valid_at=NOW + 1001),  # expired
            base._replace(digests=()),
        ]
        found = await asyncio.gather(*(backend.find(match, 5) for match in (*fits, *misses)))
        assert found == [[stored]] * len(fits) + [[]] * len(misses)
        alone = [await backend.find(match, 5) for match in (*fits, *misses)]
        assert alone == found


async def test_a_use_in_company_minds_every_condition(path: Path) -> None:
    misses: list[dict[str, Any]] = [
        {"content_type": "auth.group"},
        {"object_id": "0"},
        {"slug": ""},
        {"context": b""},
        {"context": b"another browser"},
        {"valid_at": NOW + 1001},  # expired
        {"digests": ()},
    ]
    fits: list[dict[str, Any]] = [{}, {"object_id": None}, {"context": b"browser"}, {"valid_at": NOW + 1000}]
    asked = [*fits, *misses]
    async with opened(SQLiteBackend(path)) as backend:
        for number in range(len(asked)):
            stored = token(number, str(number))._replace(context=b"browser")
            await backend.insert(stored, InsertMode.ADD)
        matches = [valid(n, str(n))._replace(**fields) for n, fields in enumerate(asked)]
        used = await asyncio.gather(*(backend.update(match, Use(NOW)) for match in matches))
        assert [t is not None for t in used] == [True] * len(fits) + [False] * len(misses)


async def test_budgets_leases_and_purges_ride_along(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        budget = Budget("auth.user", "1", "reset", "attempts")
        await backend.insert(token(1), InsertMode.ADD)
        await backend.insert(token(2, "2", created_at=NOW - 5000), InsertMode.ADD)
        answers = await asyncio.gather(
            *(backend.spend(budget, NOW, 3, 100, 1000) for _ in range(10)),
            backend.update(valid(1), Lease("mine", NOW + 10)),
            backend.update(valid(1), Use(NOW)),
            backend.purge(NOW, NOW, 10, NOW - 1),
            backend.count(NOW),
        )
        assert [s.allowed for s in answers[:10]] == [True] * 3 + [False] * 7  # type: ignore[union-attr]  # all are answers
        assert answers[10] is not None
        assert answers[11] is None
        assert answers[12] == 1


async def test_a_neighbour_that_fails_harms_nobody(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        too_late = token(3, "3")._replace(expires_at=2**70)  # no integer for SQLite
        answers = await asyncio.gather(
            backend.insert(token(1), InsertMode.REPLACE),
            backend.insert(too_late, InsertMode.REPLACE),
            backend.insert(token(2, "2"), InsertMode.REPLACE),
            backend.find(valid(1), 1),
            return_exceptions=True,
        )
        assert answers[0] is INSERTED
        assert isinstance(answers[1], BackendError)
        assert answers[2] is INSERTED
        assert answers[3] == [token(1)]


async def test_without_room_reads_go_on_and_each_write_is_told(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1), InsertMode.REPLACE)
        await ask(backend, "PRAGMA max_page_count = 1")  # SQLite takes what there is
        big = [token(n, str(n))._replace(extra_data='"' + "x" * 9000 + '"') for n in range(10, 20)]
        work: list[Coroutine[Any, Any, object]] = [backend.find(valid(1), 1)]
        work += [backend.insert(t, InsertMode.REPLACE) for t in big]
        answers = await asyncio.gather(*work, return_exceptions=True)
        assert answers[0] == [token(1)]
        assert [type(answer) for answer in answers[1:]] == [BackendUnavailable] * 10
        await ask(backend, "PRAGMA max_page_count = 100000")
        assert await asyncio.gather(*(backend.insert(t, InsertMode.REPLACE) for t in big)) == [INSERTED] * 10
    with plain(path) as database:
        assert database.execute("SELECT count(*) FROM tokens").fetchone() == (11,)


async def test_behind_a_foreign_lock_reads_go_on(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=50)) as backend:
        await backend.insert(token(1), InsertMode.REPLACE)
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            answers = await asyncio.gather(
                backend.insert(token(2, "2"), InsertMode.REPLACE),
                backend.find(valid(1), 1),
                *(backend.update(valid(1), Use(NOW)) for _ in range(5)),
                return_exceptions=True,
            )
            database.execute("ROLLBACK")
        assert answers[1] == [token(1)]
        assert [type(answer) for n, answer in enumerate(answers) if n != 1] == [BackendUnavailable] * 6
        assert await backend.update(valid(1), Use(NOW)) is not None


@pytest.mark.parametrize("size", [2, 3, 255, 256, 257, 600])
async def test_batches_of_every_size(path: Path, size: int) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        tokens = [token(n, str(n)) for n in range(size)]
        assert (
            await asyncio.gather(*(backend.insert(t, InsertMode.REPLACE) for t in tokens))
            == [INSERTED] * size
        )
        used = await asyncio.gather(*(backend.update(valid(n, str(n)), Use(NOW)) for n in range(size)))
        assert [t is not None and t.id for t in used] == [t.id for t in tokens]


async def test_mixed_batches_come_to_what_one_by_one_comes_to(tmp_path: Path) -> None:
    """Every operation once in company and once alone, on two stores; in the end they hold the same."""

    def three(backend: SQLiteBackend, n: int) -> list[Operation]:
        modes = (InsertMode.REPLACE, InsertMode.ADD, InsertMode.IF_NONE_VALID)
        looked_for, used = valid(n // 2, str(n // 2 % 7)), valid(n // 3, str(n // 3 % 7))
        return [
            lambda: backend.insert(token(n, str(n % 7)), modes[n % 3], NOW + 5 if n % 5 else 0),
            lambda: backend.find(looked_for, 3),
            lambda: backend.update(used, Use(NOW + 1)),
        ]

    def operations(backend: SQLiteBackend) -> list[Operation]:
        return [operation for n in range(120) for operation in three(backend, n)]

    async def everything(backend: SQLiteBackend) -> list[StoredToken]:
        return await backend.find(Match(), 1000)

    async with (
        opened(SQLiteBackend(tmp_path / "company.db")) as company,
        opened(SQLiteBackend(tmp_path / "alone.db")) as alone,
    ):
        together = await asyncio.gather(*(operation() for operation in operations(company)))
        one_by_one = [await operation() for operation in operations(alone)]
        assert together == one_by_one
        assert await everything(company) == await everything(alone)


async def test_what_was_undone_with_its_neighbours_is_done_again_alone(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1), InsertMode.REPLACE)
        await ask(backend, "PRAGMA max_page_count = 1")  # SQLite takes what there is
        big = [token(n, str(n))._replace(extra_data='"' + "x" * 9000 + '"') for n in range(10, 12)]
        used, *refused = await asyncio.gather(
            backend.update(valid(1), Use(NOW)),
            *(backend.insert(t, InsertMode.REPLACE) for t in big),
            return_exceptions=True,
        )
        assert isinstance(used, StoredToken)
        assert [type(answer) for answer in refused] == [BackendUnavailable] * 2
        assert await backend.find(Match(id=token(1).id), 1) == [used]


async def test_a_use_id_counts_once_in_company_too(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        for n in (1, 2):
            await backend.insert(token(n, str(n))._replace(max_uses=3), InsertMode.ADD)
            assert await backend.update(valid(n, str(n)), Use(NOW, "a")) is not None
        again = await asyncio.gather(*(backend.update(valid(n, str(n)), Use(NOW, "a")) for n in (1, 2)))
        assert again == [None, None]
        other = await asyncio.gather(*(backend.update(valid(n, str(n)), Use(NOW, "b")) for n in (1, 2)))
        assert [t.use_ids if t else None for t in other] == [("a", "b")] * 2
