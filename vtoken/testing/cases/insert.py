"""The protocol's sentences about ``insert``, but for overlaps (``overlap``) and limits (``limits``)."""

from __future__ import annotations

from typing import Any, Final

from vtoken.backend import (
    NEVER,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    State,
    StoredHold,
    StoredToken,
    TokenBackend,
    replaced,
)
from vtoken.testing.cases.strings import UNICODE
from vtoken.testing.harness import (
    DAY,
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_digest,
    a_token,
    at_once,
    case,
    find_all,
    one,
    put,
)

ADD, REPLACE, IF_NONE_VALID = InsertMode.ADD, InsertMode.REPLACE, InsertMode.IF_NONE_VALID
INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID
A_HOLD: Final = StoredHold(hold_id="h", until=NOW + MINUTE, use_id="u", origin=f"{1:016x}")


def records() -> list[StoredToken]:
    """Tokens whose fields are at their limits, or easily mistaken for each other."""
    return [
        a_token(),
        a_token(content_type=UNICODE, object_id=UNICODE, slug=UNICODE, extra_data=UNICODE),
        a_token(object_id="é" * 256, extra_data="x" * 16_384),
        a_token(extra_data="", slug="", expires_at=NEVER, max_uses=None),
        a_token(extra_data='{"b": 1,  "a": [null, 1.0, 1e400, 9007199254740993]}', is_beside=True),
        a_token({"digest": bytes(32)}, context=b"\x00\xff" * 16, created_at=1),
        a_token({"digest": b"\xff" * 32}, created_at=NEVER, expires_at=NEVER),
        a_token({"scheme": "code-hmac-sha256", "secret_id": "0f" * 4, "plain_key": "plain " + UNICODE}),
        a_token({"nonce": "n" * 43}, {"kind": "code", "expires_at": NOW, "plain_key": "1", "nonce": ""}),
        a_token({"origin": f"{7:016x}"}, {"origin": f"{2**63 - 1:016x}"}, max_uses=2**31 - 1, uses=2**31 - 2),
        a_token(
            state=State.USED, ends_at=NOW - 1, uses=1, used_at=NOW, holds=(A_HOLD,), keys=(), id=f"{5:016x}"
        ),
        a_token(state=State.ENDED, ends_at=-1, holds=(A_HOLD, A_HOLD._replace(hold_id=UNICODE, until=NEVER))),
        a_token(state=State.REPLACED, holds=(A_HOLD._replace(origin=f"{3:016x}"),), id=f"{2**63 - 2:016x}"),
    ]


def with_types(value: Any) -> Any:
    """A value with the types of all its parts, because ``True == 1``."""
    if isinstance(value, tuple):
        return type(value), [with_types(part) for part in value]
    return type(value), value


async def insert(backend: TokenBackend, token: StoredToken, mode: InsertMode, **named: Any) -> StoredToken:
    """Insert a token, which must succeed, and return it as it is stored."""
    inserted = await backend.insert(token, mode, **named)
    stored = await one(backend, token)
    assert (inserted.result, inserted.token) == (INSERTED, stored)
    return stored


class InsertCases(Suite):
    """Cases of ``insert``; what they store, others find."""

    @case(11)
    async def test_every_field_comes_back_exactly(self, bench: Bench) -> None:
        """A record is stored in all its fields and comes back equal, types included, in another backend."""
        backend = await bench.backend()
        stored = records()
        for record in stored:
            assert await backend.insert(record, ADD) == Inserted(INSERTED, record)
        for reader in (backend, await bench.backend()):
            for record in stored:
                assert with_types(await one(reader, record)) == with_types(record)

    @case(2)
    async def test_add_leaves_others_as_they_are(self, bench: Bench) -> None:
        """``ADD`` leaves the tokens that are there as they are, and its token is marked as one beside
        others."""
        backend = await bench.backend()
        old = await insert(backend, a_token(), REPLACE)
        new = await insert(backend, a_token(is_beside=True), ADD)
        assert await find_all(backend) == [new, old]
        assert (new.is_beside, old.is_beside) == (True, False)

    @case(2)
    async def test_replace_ends_its_own_line_alone(self, bench: Bench) -> None:
        """``REPLACE`` replaces the active tokens of the same content type, object id, slug and context, held
        and expired ones too, and no others."""
        backend = await bench.backend()
        old = [
            await put(backend, is_beside=True),
            await put(backend, expires_at=NOW - 1, created_at=NOW - MINUTE),
            await put(backend, holds=(A_HOLD,), max_uses=3),
        ]
        others = [
            await put(backend, content_type="auth.User"),
            await put(backend, object_id="4"),
            await put(backend, slug=""),
            await put(backend, slug="reset2"),
            await put(backend, context=b"c" * 32),
            await put(backend, state=State.ENDED, ends_at=NOW - 5),
            await put(backend, state=State.USED, ends_at=NOW - 5, uses=1),
        ]
        new = await insert(backend, a_token(created_at=NOW + 10), REPLACE)
        for token in old:
            assert await one(backend, token) == replaced(token, NOW + 10)
        assert [(await one(backend, token)).ends_at for token in old] == [NOW + 9, NOW - 1, NOW + 9]
        for token in [*others, new]:
            assert await one(backend, token) == token

    @case(2)
    async def test_replace_without_slug_leaves_slugs(self, bench: Bench) -> None:
        """``slug=""`` names the tokens without a slug, not those of every slug."""
        backend = await bench.backend()
        named, nameless = await put(backend), await put(backend, slug="")
        await insert(backend, a_token(slug="", created_at=NOW + 1), REPLACE)
        assert await one(backend, named) == named
        assert await one(backend, nameless) == replaced(nameless, NOW + 1)

    @case(2)
    async def test_contexts_have_lines_of_their_own(self, bench: Bench) -> None:
        """A re-issue in one context leaves the tokens of every other one, and each line counts by itself."""
        backend = await bench.backend()
        contexts = [b"", b"a" * 32, b"A" * 32, b"a" * 31]
        tokens = [await insert(backend, a_token(context=context), REPLACE) for context in contexts]
        assert await find_all(backend) == tokens[::-1]
        again = await insert(backend, a_token(context=contexts[1]), REPLACE)
        active = await backend.find(Match(active=True), 9)
        assert active == [again, tokens[3], tokens[2], tokens[0]]
        for context, found in ((b"b" * 32, INSERTED), (contexts[2], HAS_VALID)):
            new = a_token(context=context)
            assert (await backend.insert(new, IF_NONE_VALID, wanted_until=NOW)).result is found

    @case(2)
    async def test_a_token_that_is_born_ended_replaces(self, bench: Bench) -> None:
        """A token whose state is not ACTIVE is stored as it is, and replaces all the same."""
        backend = await bench.backend()
        old = await put(backend)
        born = a_token(state=State.ENDED, ends_at=NOW - 1, created_at=NOW + 1)
        assert await insert(backend, born, REPLACE) == born
        assert await one(backend, old) == replaced(old, NOW + 1)
        # It has nothing to fear of the next one, either.
        await insert(backend, a_token(created_at=NOW + 2), REPLACE)
        assert await one(backend, born) == born

    @case(2)
    async def test_of_concurrent_replaces_one_stays_active(self, bench: Bench) -> None:
        """Of N concurrent ``REPLACE`` all insert and exactly one token stays active."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            tokens = [a_token(object_id=f"r{number}", created_at=NOW + n % 3) for n in range(self.tasks)]
            calls = [backends[n % 2].insert(token, REPLACE) for n, token in enumerate(tokens)]
            assert {inserted.result for inserted in await at_once(calls)} == {INSERTED}
            found = await backends[0].find(Match(object_id=f"r{number}"), 99)
            assert [token.id for token in found] == [token.id for token in reversed(tokens)]
            states = [token.state for token in found]
            assert states.count(State.ACTIVE) == 1
            assert states.count(State.REPLACED) == self.tasks - 1

    @case(3)
    async def test_of_concurrent_if_none_valid_one_inserts(self, bench: Bench) -> None:
        """Of N concurrent ``IF_NONE_VALID`` exactly one inserts, and the others are given its token."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            who = f"r{number}"
            if number % 2:
                await put(backends[0], object_id=who, expires_at=NOW - 1)
            calls = [
                backends[n % 2].insert(a_token(object_id=who), IF_NONE_VALID, wanted_until=NOW)
                for n in range(self.tasks)
            ]
            answers = await at_once(calls)
            assert sorted(answer.result.value for answer in answers) == ["has-valid"] * (self.tasks - 1) + [
                "inserted"
            ]
            valid = await backends[0].find(Match(object_id=who, valid_at=NOW), 99)
            assert [answer.token for answer in answers] == valid * self.tasks

    @case(3)
    async def test_replace_and_if_none_valid_mix(self, bench: Bench) -> None:
        """``REPLACE``, ``ADD`` and ``IF_NONE_VALID`` at once leave exactly one active token that is not
        beside others."""
        backends = await bench.two_backends()
        modes = [REPLACE, IF_NONE_VALID, ADD]
        for number in range(self.rounds):
            who = f"r{number}"
            calls = [
                backends[n // 3 % 2].insert(
                    a_token(object_id=who, is_beside=n % 3 == 2, expires_at=NOW + n),
                    modes[n % 3],
                    wanted_until=NOW + self.tasks // 2,
                )
                for n in range(self.tasks)
            ]
            await at_once(calls)
            active = await backends[0].find(Match(object_id=who, active=True), 99)
            assert sum(not token.is_beside for token in active) == 1

    @case(3)
    async def test_if_none_valid_yields_to_a_valid_token(self, bench: Bench) -> None:
        """``IF_NONE_VALID`` changes nothing where a token is good until ``wanted_until``, that millisecond
        included, whether or not its uses are held; the newest is the answer."""
        backend = await bench.backend()
        expired = await put(backend, created_at=NOW - 9, expires_at=NOW - 1)
        older = await put(backend, expires_at=NOW + MINUTE)
        valid = await put(backend, expires_at=NOW + MINUTE, holds=(A_HOLD,), is_beside=True)
        for wanted in (NOW, NOW + MINUTE):
            answer = await backend.insert(a_token(), IF_NONE_VALID, wanted_until=wanted)
            assert answer == Inserted(HAS_VALID, valid)
        assert await find_all(backend) == [valid, older, expired]
        for other in ({"slug": ""}, {"object_id": "43"}, {"content_type": "auth"}, {"context": b"c"}):
            await insert(backend, a_token(**other), IF_NONE_VALID, wanted_until=NOW)

    @case(3)
    async def test_if_none_valid_replaces_what_ends_too_soon(self, bench: Bench) -> None:
        """Where none is good until ``wanted_until``, neither in its own expiry nor in that of each of its own
        keys, ``IF_NONE_VALID`` inserts and replaces the active ones."""
        backend = await bench.backend()
        wanted = NOW + MINUTE
        old = [
            await put(backend, expires_at=NOW - 1),
            await put(backend, expires_at=wanted - 1),
            await put(backend, {}, {"kind": "code", "expires_at": wanted - 1}),
        ]
        new = await insert(backend, a_token(), IF_NONE_VALID, wanted_until=wanted)
        assert await find_all(backend) == [new, *(replaced(token, NOW) for token in reversed(old))]
        short = await put(
            backend, {}, {"expires_at": NOW, "origin": new.id}, object_id="7", expires_at=wanted
        )
        answer = await backend.insert(a_token(object_id="7"), IF_NONE_VALID, wanted_until=wanted)
        assert answer == Inserted(HAS_VALID, short)

    @case(2)
    async def test_a_taken_key_changes_nothing(self, bench: Bench) -> None:
        """Where another token, active or not, has one of the digests or of ``also_taken``, or the id,
        ``KEY_TAKEN`` is the answer and nothing changed."""
        backend = await bench.backend()
        stored = [
            await put(backend, expires_at=NOW - 1),
            await put(backend, holds=(A_HOLD,)),
            await put(backend, object_id="7"),
            await put(backend, object_id="8", state=State.ENDED, ends_at=NOW - 6),
            await put(backend, {}, {"kind": "code"}, object_id="9"),
            await put(backend, {"kind": "code"}, slug="other", state=State.ENDED, ends_at=NOW - 6),
            await put(backend, {"kind": "code"}, content_type="other", expires_at=NOW - 1),
        ]
        before = await find_all(backend)
        digests = [key.digest for token in stored for key in token.keys]
        for digest in digests:
            for mode in (ADD, REPLACE, IF_NONE_VALID):
                named: dict[str, Any] = {"wanted_until": DAY + NOW} if mode is IF_NONE_VALID else {}
                if mode is REPLACE:
                    named = {"keep_until": NOW + MINUTE}
                for kind in ("link", "code"):
                    new = a_token({}, {"digest": digest, "kind": kind})
                    assert await backend.insert(new, mode, **named) == Inserted(KEY_TAKEN)
                answer = await backend.insert(a_token(), mode, also_taken=(a_digest("free"), digest), **named)
                assert answer == Inserted(KEY_TAKEN)
        for token in stored:
            new = a_token(id=token.id, slug="of its own")
            assert await backend.insert(new, REPLACE) == Inserted(KEY_TAKEN)
        assert await find_all(backend) == before

    @case(2)
    async def test_of_concurrent_equal_keys_one_is_stored(self, bench: Bench) -> None:
        """Digests are unique over the whole store, also among concurrent inserts, and whatever their kind."""
        backends = await bench.two_backends()
        modes = [ADD, REPLACE, IF_NONE_VALID]
        for number in range(self.rounds):
            taken = a_digest(f"same {number}")
            tokens = [
                a_token({}, {"digest": taken, "kind": ("link", "code")[n % 2]}, object_id=f"{number}-{n}")
                for n in range(self.tasks)
            ]
            calls = [
                backends[n // 2 % 2].insert(
                    token, mode := modes[n % 3], wanted_until=NOW if mode is IF_NONE_VALID else 0
                )
                for n, token in enumerate(tokens)
            ]
            results = [inserted.result for inserted in await at_once(calls)]
            assert (results.count(INSERTED), results.count(KEY_TAKEN)) == (1, self.tasks - 1)
            assert len(await backends[1].find(Match(digests=(taken,)), 99)) == 1

    @case(2)
    async def test_of_concurrent_equal_ids_one_is_stored(self, bench: Bench) -> None:
        """Ids are unique over the whole store, also among concurrent inserts."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = a_token()
            calls = [
                backends[n % 2].insert(a_token(id=token.id, object_id=f"{number}-{n}"), REPLACE)
                for n in range(self.tasks)
            ]
            results = [inserted.result for inserted in await at_once(calls)]
            assert (results.count(INSERTED), results.count(KEY_TAKEN)) == (1, self.tasks - 1)
            assert len(await backends[1].find(Match(id=token.id), 99)) == 1

    @case(2)
    async def test_a_code_that_is_over_is_superseded(self, bench: Bench) -> None:
        """A code of the same object and slug whose token is over, or is replaced by this very insert, is
        taken from that token, which keeps its other keys."""
        backend = await bench.backend()
        over: list[dict[str, Any]] = [
            {"state": State.USED, "uses": 1, "ends_at": NOW - 1},
            {"state": State.ENDED, "ends_at": NOW - 1},
            {"state": State.REPLACED, "ends_at": NOW - 1, "context": b"c"},
            {"expires_at": NOW - 1},
            {"expires_at": NOW - 1, "context": b"c"},
        ]
        for number, fields in enumerate(over):
            for mode in (ADD, REPLACE, IF_NONE_VALID):
                who = f"{number} {mode.value}"
                old = await put(backend, {}, {"kind": "code"}, object_id=who, **fields)
                new = a_token({"kind": "code", "digest": old.keys[1].digest}, object_id=who)
                assert await insert(backend, new, mode, wanted_until=NOW) == new
                left = await one(backend, old)
                assert left.keys == old.keys[:1]
                expected = (
                    replaced(old, NOW) if mode is not ADD and old.is_active and not old.context else old
                )
                assert left._replace(keys=()) == expected._replace(keys=())
                assert await backend.find(Match(digests=(old.keys[1].digest,)), 9) == [new]

    @case(2)
    async def test_an_own_code_can_be_issued_again_and_again(self, bench: Bench) -> None:
        """A fixed code of one object is issued again and again: each time it passes to the newest token."""
        backend = await bench.backend()
        digest = a_digest("the same code")
        for number in range(4):
            new = a_token({"kind": "code", "digest": digest}, created_at=NOW + number)
            assert await insert(backend, new, REPLACE, keep_until=NOW + MINUTE) == new
        newest, *older = await find_all(backend)
        assert [key.digest for key in newest.keys] == [digest]
        assert [token.keys for token in older] == [()] * 3
        # Beside a valid one it is taken, and so is one of a valid token of another context.
        again = a_token({"kind": "code", "digest": digest}, is_beside=True)
        assert await backend.insert(again, ADD) == Inserted(KEY_TAKEN)
        assert await backend.insert(again._replace(context=b"c"), REPLACE) == Inserted(KEY_TAKEN)
        # Under a previous secret, too, the older token loses it.
        another = a_token({"kind": "code"}, created_at=NOW + 9)
        await insert(backend, another, REPLACE, also_taken=(digest,))
        assert (await one(backend, newest)).keys == ()

    @case(3)
    async def test_once_inserts_once(self, bench: Bench) -> None:
        """``ONCE`` replaces and inserts unless a token with one of the keys is stored, whatever its state,
        and then answers that token."""
        backend = await bench.backend()
        old = await put(backend)
        new = await insert(backend, a_token({"kind": "code"}, created_at=NOW + 1), InsertMode.ONCE)
        assert await one(backend, old) == replaced(old, NOW + 1)
        again = a_token({"kind": "code", "digest": new.keys[0].digest}, created_at=NOW + 2)
        for at in (NOW + 3, NOW + 4):
            assert await backend.insert(again, InsertMode.ONCE) == Inserted(KEY_TAKEN, new)
            await backend.deactivate(Match(id=new.id), at)
            new = await one(backend, new)
        under_another_secret = a_token(created_at=NOW + 5)
        answer = await backend.insert(
            under_another_secret, InsertMode.ONCE, also_taken=(new.keys[0].digest, a_digest("free"))
        )
        assert answer == Inserted(KEY_TAKEN, new)
        assert len(await find_all(backend)) == 2

    @case(3)
    async def test_of_concurrent_once_all_get_one(self, bench: Bench) -> None:
        """Of N concurrent ``ONCE`` with one key exactly one inserts, and all are given its token."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            digest = a_digest(f"once {number}")
            tokens = [a_token({"digest": digest}, object_id=f"r{number}") for _ in range(self.tasks)]
            calls = [backends[n % 2].insert(token, InsertMode.ONCE) for n, token in enumerate(tokens)]
            answers = await at_once(calls)
            results = [answer.result for answer in answers]
            assert (results.count(INSERTED), results.count(KEY_TAKEN)) == (1, self.tasks - 1)
            stored = await backends[0].find(Match(object_id=f"r{number}"), 99)
            assert [answer.token for answer in answers] == stored * self.tasks
