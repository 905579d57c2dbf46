"""The protocol's sentences about ``insert``."""

from __future__ import annotations

from vtoken.backend import NEVER, InsertMode, InsertResult, Match, StoredToken, TokenBackend, Use
from vtoken.testing._bench import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_digest,
    a_token,
    at_once,
    case,
    ended,
    find_all,
    where,
)

ADD, REPLACE, IF_NONE_VALID = InsertMode.ADD, InsertMode.REPLACE, InsertMode.IF_NONE_VALID
INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID

# Combining marks, right-to-left, astral planes, controls, and the letters databases like to fold.
UNICODE = "Zoë e\u0301 שלום 🤷🏽\u200d♀️ İıſß ﷽ \U0010ffff \x01\x1f\x7f\ufeff '\"\\;--$%_*?"


async def one(backend: TokenBackend, token: StoredToken) -> StoredToken:
    """The token as it is stored now."""
    found = await backend.find(Match(id=token.id), 2)
    assert len(found) == 1
    return found[0]


async def put(backend: TokenBackend, **fields: object) -> StoredToken:
    """Add a token with these fields."""
    token = a_token(**fields)
    assert await backend.insert(token, ADD) is INSERTED
    return token


def with_types(token: StoredToken) -> list[tuple[type, object]]:
    """The fields with their types, because ``True == 1``."""
    return [(type(value), value) for value in token]


class InsertCases(Suite):
    """Cases of ``insert``; what they store, others find."""

    @case(11)
    async def test_every_field_comes_back_exactly(self, bench: Bench) -> None:
        """A record is stored in all its fields and comes back equal, types included, in another backend."""
        records = [
            a_token(),
            a_token(content_type=UNICODE, object_id=UNICODE, slug=UNICODE, extra_data=UNICODE),
            a_token(object_id="é" * 256, extra_data="x" * 16_384),
            a_token(extra_data="", slug="", expires_at=NEVER),
            a_token(extra_data='{"b": 1,  "a": [null, 1.0, 1e400, 9007199254740993]}'),
            a_token(digest=bytes(32), context=b"\x00\xff" * 16, created_at=1),
            a_token(digest=b"\xff" * 32, created_at=NEVER, expires_at=NEVER),
            a_token(
                scheme="code-hmac-sha256", secret_id="0f" * 4, plain_key="plain " + UNICODE, nonce="n" * 43
            ),
            a_token(max_uses=2**31 - 1, uses=3, used_at=NOW + 1, use_ids=("b", "a", UNICODE)),
            a_token(
                is_active=False, ends_at=NOW - 1, uses=1, used_at=NOW, lease_id="l" * 32, lease_until=NOW + 1
            ),
        ]
        backend = await bench.backend()
        for record in records:
            assert await backend.insert(record, ADD) is INSERTED
        for reader in (backend, await bench.backend()):
            for record in records:
                assert with_types(await one(reader, record)) == with_types(record)

    @case(6)
    async def test_strings_are_compared_exactly(self, bench: Bench) -> None:
        """Content type, object id and slug match by value alone: no folding, trimming, patterns or
        numbers."""
        names = [
            "1",
            "01",
            "1.0",
            "a",
            "A",
            "a ",
            " a",
            "á",
            "a\u0301",
            "ß",
            "ss",
            "%",
            "_",
            "*",
            ".",
            "null",
        ]
        names += ['{"$ne": null}', "$ne", "' OR '1'='1", "a\n", "I", "ı", "i"]
        backend = await bench.backend()
        for field in ("content_type", "object_id", "slug"):
            tokens = {name: await put(backend, **{field: name}) for name in names}
            for name, token in tokens.items():
                assert await backend.find(where(**{field: name}), 99) == [token], (field, name)

    @case(2)
    async def test_add_leaves_others_as_they_are(self, bench: Bench) -> None:
        """``ADD`` leaves the tokens that are there as they are."""
        backend = await bench.backend()
        old = await put(backend)
        new = await put(backend, created_at=NOW + 1)
        assert await find_all(backend) == [new, old]

    @case(2)
    async def test_replace_deactivates_its_own_kind_alone(self, bench: Bench) -> None:
        """``REPLACE`` deactivates the active tokens of the same content type, object id and slug, no
        others."""
        backend = await bench.backend()
        old = [await put(backend), await put(backend, expires_at=NOW - 1, created_at=NOW - MINUTE)]
        old.append(await put(backend, lease_id="l", lease_until=NOW + MINUTE))
        others = [
            await put(backend, content_type="auth.User"),
            await put(backend, object_id="4"),
            await put(backend, slug=""),
            await put(backend, slug="reset2"),
            await put(backend, is_active=False, ends_at=NOW - 5),
        ]
        new = a_token(created_at=NOW + 10)
        assert await backend.insert(new, REPLACE) is INSERTED
        for token in old:
            assert await one(backend, token) == ended(token, NOW + 10)
        for token in [*others, new]:
            assert await one(backend, token) == token

    @case(2)
    async def test_replace_without_slug_leaves_slugs(self, bench: Bench) -> None:
        """``slug=""`` names the tokens without a slug, not those of every slug."""
        backend = await bench.backend()
        named, nameless = await put(backend), await put(backend, slug="")
        assert await backend.insert(a_token(slug="", created_at=NOW + 1), REPLACE) is INSERTED
        assert await one(backend, named) == named
        assert await one(backend, nameless) == ended(nameless, NOW + 1)

    @case(2)
    async def test_of_concurrent_replaces_one_stays_active(self, bench: Bench) -> None:
        """Of N concurrent ``REPLACE`` all insert and exactly one token stays active."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            tokens = [a_token(object_id=f"r{number}", created_at=NOW + n % 3) for n in range(self.tasks)]
            calls = [backends[n % 2].insert(token, REPLACE) for n, token in enumerate(tokens)]
            won = await at_once(calls)
            assert won == [INSERTED] * self.tasks
            found = await backends[0].find(Match(object_id=f"r{number}"), 99)
            assert len(found) == self.tasks
            assert sum(token.is_active for token in found) == 1

    @case(3)
    async def test_of_concurrent_if_none_valid_one_inserts(self, bench: Bench) -> None:
        """Of N concurrent ``IF_NONE_VALID`` exactly one inserts, and the others say ``HAS_VALID``."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            who = f"r{number}"
            if number % 2:
                await put(backends[0], object_id=who, expires_at=NOW - 1)
            calls = [backends[n % 2].insert(a_token(object_id=who), IF_NONE_VALID) for n in range(self.tasks)]
            won = await at_once(calls)
            assert sorted(won, key=str) == sorted([INSERTED] + [HAS_VALID] * (self.tasks - 1), key=str)
            assert len(await backends[0].find(Match(object_id=who, valid_at=NOW), 99)) == 1

    @case(3)
    async def test_replace_and_if_none_valid_mix(self, bench: Bench) -> None:
        """``REPLACE`` and ``IF_NONE_VALID`` at once leave exactly one active token."""
        backends = [await bench.backend(), await bench.backend()]
        modes = [REPLACE, IF_NONE_VALID]
        for number in range(self.rounds):
            who = f"r{number}"
            calls = [
                backends[n // 2 % 2].insert(a_token(object_id=who), modes[n % 2]) for n in range(self.tasks)
            ]
            await at_once(calls)
            assert len(await backends[0].find(Match(object_id=who, active=True), 99)) == 1

    @case(3)
    async def test_if_none_valid_yields_to_a_valid_token(self, bench: Bench) -> None:
        """``IF_NONE_VALID`` changes nothing where a token is valid at ``created_at``, its last millisecond
        included."""
        backend = await bench.backend()
        expired = await put(backend, created_at=NOW - 9, expires_at=NOW - 1)
        valid = await put(backend, expires_at=NOW, lease_id="l", lease_until=NOW)
        assert await backend.insert(a_token(), IF_NONE_VALID) is HAS_VALID
        assert await find_all(backend) == [valid, expired]
        for other in ({"slug": ""}, {"object_id": "43"}, {"content_type": "auth"}):
            assert await backend.insert(a_token(**other), IF_NONE_VALID) is INSERTED

    @case(3)
    async def test_if_none_valid_deactivates_the_expired_and_leased(self, bench: Bench) -> None:
        """Where none is valid, ``IF_NONE_VALID`` inserts and deactivates the active ones as ``REPLACE``
        does."""
        backend = await bench.backend()
        expired = await put(backend, created_at=NOW - 9, expires_at=NOW - 1)
        leased = await put(backend, created_at=NOW - 8, lease_id="l", lease_until=NOW + 1)
        new = a_token()
        assert await backend.insert(new, IF_NONE_VALID) is INSERTED
        assert await find_all(backend) == [new, ended(leased, NOW), ended(expired, NOW)]

    @case(2)
    async def test_a_taken_key_changes_nothing(self, bench: Bench) -> None:
        """Where another token, active or not, has the digest, ``KEY_TAKEN`` is the answer and nothing
        changed."""
        backend = await bench.backend()
        mine = await put(backend, created_at=NOW - 9, expires_at=NOW - 1)
        leased = await put(backend, created_at=NOW - 8, lease_id="l", lease_until=NOW + 1)
        theirs = await put(backend, object_id="7", created_at=NOW - 7)
        gone = await put(backend, object_id="8", created_at=NOW - 6, is_active=False, ends_at=NOW - 6)
        before = await find_all(backend)
        for taken in (mine, theirs, gone, leased):
            for mode in InsertMode:
                assert await backend.insert(a_token(digest=taken.digest), mode) is KEY_TAKEN
            again = a_token(digest=taken.digest)
            assert await backend.insert(again, REPLACE, NOW + MINUTE) is KEY_TAKEN
            assert await find_all(backend) == before

    @case(2)
    async def test_of_concurrent_equal_keys_one_is_stored(self, bench: Bench) -> None:
        """Digests are unique over the whole store, also among concurrent inserts."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            taken = a_digest(f"same {number}")
            tokens = [a_token(object_id=f"{number}-{n}", digest=taken) for n in range(self.tasks)]
            modes = list(InsertMode)
            calls = [backends[n % 2].insert(token, modes[n % 3]) for n, token in enumerate(tokens)]
            won = await at_once(calls)
            assert sorted(won, key=str) == sorted([INSERTED] + [KEY_TAKEN] * (self.tasks - 1), key=str)
            assert len(await backends[1].find(Match(digests=(taken,)), 99)) == 1

    @case(2)
    async def test_keep_until_shortens_the_old_tokens(self, bench: Bench) -> None:
        """With ``keep_until`` the old stay active and end at the earlier of their own end and
        ``keep_until``."""
        backend = await bench.backend()
        long = await put(backend, created_at=NOW - 9)
        short = await put(backend, created_at=NOW - 8, expires_at=NOW + 5)
        gone = await put(backend, created_at=NOW - 7, is_active=False, ends_at=NOW - 7)
        other = await put(backend, created_at=NOW - 6, slug="other")
        new = a_token()
        assert await backend.insert(new, REPLACE, NOW + MINUTE) is INSERTED
        kept = long._replace(expires_at=NOW + MINUTE, ends_at=NOW + MINUTE)
        assert await find_all(backend) == [new, other, gone, short, kept]

    @case(2)
    async def test_keep_until_in_the_past_keeps_nothing(self, bench: Bench) -> None:
        """A ``keep_until`` no later than ``created_at`` deactivates the old tokens as without one."""
        backend = await bench.backend()
        for keep_until in (0, NOW - 1, NOW):
            old = await put(backend, object_id=f"k{keep_until}", created_at=NOW - 1)
            new = a_token(object_id=f"k{keep_until}")
            assert await backend.insert(new, REPLACE, keep_until) is INSERTED
            assert await one(backend, old) == ended(old, NOW)

    @case(2)
    async def test_one_use_ends_the_whole_overlap(self, bench: Bench) -> None:
        """The use of one overlapping token deactivates the others of its overlap, and no other token."""
        backend = await bench.backend()
        for used in range(3):
            who = f"u{used}"
            other = await put(backend, object_id=who, slug="other")
            tokens = [a_token(object_id=who, created_at=NOW + n, max_uses=2) for n in range(3)]
            for token in tokens:
                assert await backend.insert(token, REPLACE, NOW + MINUTE) is INSERTED
            at = NOW + 100
            changed = await backend.update(Match(id=tokens[used].id, valid_at=at), Use(at, "a"))
            assert changed is not None
            assert (changed.is_active, changed.uses) == (True, 1)
            for n, token in enumerate(tokens):
                now = await one(backend, token)
                assert now.is_active == (n == used)
                assert n == used or (now.ends_at, now.uses, now.used_at) == (at - 1, 0, 0)
            assert await one(backend, other) == other

    @case(1)
    async def test_of_concurrent_uses_of_an_overlap_one_wins(self, bench: Bench) -> None:
        """Of two overlapping tokens used at once, one use wins."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds * 2):
            tokens = [a_token(object_id=f"o{number}", created_at=NOW + n) for n in range(2)]
            for token in tokens:
                assert await backends[0].insert(token, REPLACE, NOW + MINUTE) is INSERTED
            calls = [
                backends[(n + number) % 2].update(Match(id=tokens[n % 2].id, valid_at=NOW + 9), Use(NOW + 9))
                for n in range(self.tasks)
            ]
            won = await at_once(calls)
            assert sum(token is not None for token in won) == 1
            found = await backends[0].find(Match(object_id=f"o{number}"), 9)
            assert [token.is_active for token in found] == [False, False]
            assert sum(token.uses for token in found) == 1

    @case(1)
    async def test_uses_beside_an_overlapping_replace_come_before_or_after(self, bench: Bench) -> None:
        """A use of the old token, a use of the new one and the ``REPLACE`` with ``keep_until`` at once have
        an order: after the ``REPLACE`` one of the uses wins and ends both; before it, the old one's ends no
        other."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            subjects = [f"o{number}-{n}" for n in range(self.tasks // 2)]
            await at_once(_use_beside_replace(backends, who, number + n) for n, who in enumerate(subjects))

    @case(2)
    async def test_replace_after_an_overlap_ends_it(self, bench: Bench) -> None:
        """A later ``REPLACE`` without ``keep_until`` deactivates every token of the overlap."""
        backend = await bench.backend()
        old = [a_token(created_at=NOW), a_token(created_at=NOW + 1)]
        for token in old:
            assert await backend.insert(token, REPLACE, NOW + MINUTE) is INSERTED
        assert await backend.insert(a_token(created_at=NOW + 2), REPLACE) is INSERTED
        assert [(await one(backend, token)).is_active for token in old] == [False, False]


async def _use_beside_replace(backends: list[TokenBackend], who: str, turn: int) -> None:
    until, at = NOW + MINUTE, NOW + 9
    old = await put(backends[0], object_id=who)
    new = a_token(object_id=who, created_at=NOW + 1)
    one_backend, another = backends[turn // 3 % 2], backends[0]

    async def use(token: StoredToken) -> bool:
        return await another.update(Match(id=token.id, valid_at=at), Use(at)) is not None

    async def replace() -> bool:
        return await one_backend.insert(new, REPLACE, until) is INSERTED

    calls, first = [use(old), replace(), use(new)], turn % 3
    outcomes = await at_once(calls[first:] + calls[:first])
    used_old, inserted, used_new = outcomes[-first:] + outcomes[:-first]
    assert inserted
    old, new = await one(backends[0], old), await one(backends[0], new)
    assert not old.is_active
    assert (old.uses, new.uses) == (used_old, used_new)
    if old.expires_at == until:  # only an active token is shortened: the REPLACE came first
        assert used_old != used_new
        assert not new.is_active
    else:
        assert used_old
        assert new.is_active != used_new
