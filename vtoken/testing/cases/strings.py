"""Strings that databases like to fold, trim, split or read as something else, given to every method."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from vtoken.backend import (
    Budget,
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Release,
    SetExtraData,
    State,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)
from vtoken.testing.harness import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_spend,
    a_token,
    at_once,
    by_key,
    case,
    find_all,
    one,
    put,
    where,
)

# Combining marks, right-to-left, astral planes, controls, and the letters databases like to fold.
UNICODE: Final = "Zoë e\u0301 שלום 🤷🏽\u200d♀️ İıſß ﷽ \U0010ffff \x01\x1f\x7f\ufeff '\"\\;--$%_*?"
NAMES: Final = [
    *["1", "01", "1.0", "+1", "1e0", "a", "A", "a ", " a", "a\n", "á", "a\u0301", "ß", "ss", "ẞ", "SS"],
    *["%", "_", "*", ".", ".*", "null", "None", "NULL", "true", "$ne", '{"$ne": null}', "' OR '1'='1"],
    *["I", "ı", "i", "İ", "ſ", "s", "\u200b", "a\u200b", "\ufeffa", "\x01", "\x7f", "a/b", "a:b", "a.b"],
    *["\U0001f600", "\uffff", "\ud7ff", "\ue000", "é" * 255, "é" * 255 + "e", UNICODE],
]
"""They differ from each other, so that each stands for itself and for no other."""
FIELDS: Final = ("content_type", "object_id", "slug")


class StringCases(Suite):
    """Cases of what is equal to what."""

    @case(6)
    async def test_strings_are_compared_exactly(self, bench: Bench) -> None:
        """In ``find``, content type, object id and slug match by value alone: no folding, trimming, patterns
        or numbers."""
        backend = await bench.backend()
        for field in FIELDS:
            stored = await at_once(put(backend, **{field: name}) for name in NAMES)
            tokens = dict(zip(NAMES, stored, strict=True))
            found = await at_once(backend.find(where(**{field: name}), 99) for name in tokens)
            assert found == [[token] for token in tokens.values()], field
            found = await at_once(backend.find(_named(t, field, name), 9) for name, t in tokens.items())
            assert found == [[token] for token in tokens.values()], field
            found = await at_once(backend.find(_named(t, field, f"{n}x"), 9) for n, t in tokens.items())
            assert found == [[]] * len(tokens), field

    @case(6)
    async def test_replace_minds_exact_strings(self, bench: Bench) -> None:
        """``insert`` finds the tokens to be replaced, and the valid one that is in the way, by exact strings
        alone."""
        backend = await bench.backend()
        for field in FIELDS:
            tokens = {name: a_token(**{field: name, "context": field.encode()}) for name in NAMES}
            for mode in (InsertMode.REPLACE, InsertMode.IF_NONE_VALID):
                for name, token in tokens.items():
                    new = a_token(**{field: name, "context": field.encode()})
                    inserted = await backend.insert(new, mode, wanted_until=NOW)
                    if mode is InsertMode.REPLACE:
                        tokens[name] = new
                        continue
                    assert (inserted.result, inserted.token) == (InsertResult.HAS_VALID, token)
            active = await backend.find(Match(context=field.encode(), active=True), 99)
            assert active == list(reversed(tokens.values())), field

    @case(6)
    async def test_every_write_minds_exact_strings(self, bench: Bench) -> None:
        """``present``, ``update`` and ``deactivate`` change the token of exactly their strings, though others
        differ by a letter's case, an accent or a space."""
        backend = await bench.backend()
        for field in FIELDS:
            tokens = {name: await put(backend, max_uses=2, **{field: name}) for name in NAMES}
            # Each token's key, under the names of some others.
            wrong = [
                _named(token, field, NAMES[(number + step) % len(NAMES)])
                for number, token in enumerate(tokens.values())
                for step in (1, 2, 7, 20)
            ]
            await at_once(call for match in wrong for call in _writes(backend, match))
            assert await find_all(backend, Match(active=True)) == list(reversed(tokens.values())), field
            for name, token in tokens.items():
                await at_once(_writes(backend, _named(token, field, name)))
            for token in await find_all(backend, Match(valid_at=NOW)):
                raise AssertionError(f"{getattr(token, field)!r} was not found as a {field}")
            for token in tokens.values():
                written = token._replace(extra_data="x", state=State.ENDED, ends_at=NOW + 1)
                used = written._replace(uses=1, used_at=NOW + 1)
                assert await one(backend, token) in (written, used), field

    @case(6)
    async def test_deactivating_and_erasing_mind_exact_strings(self, bench: Bench) -> None:
        """``deactivate`` and ``erase`` by content type, object id and slug reach exactly what is named."""
        backend = await bench.backend()
        for field in FIELDS:
            tokens = [await put(backend, **{field: name}) for name in NAMES]
            for token in tokens[: len(tokens) // 2]:
                match = by_key(token)._replace(digests=None)
                assert await backend.deactivate(match, NOW) == 1, getattr(token, field)
            for token in tokens[len(tokens) // 2 :]:
                if field != "slug":
                    assert await backend.erase(token.content_type, token.object_id, bytes(16)) == 1
            if field == "slug":
                assert await backend.erase("auth.user", "42", bytes(16)) == len(tokens)
        assert {token.state for token in await find_all(backend)} == {State.ENDED}

    @case(6)
    async def test_names_of_holds_uses_and_notes_are_exact(self, bench: Bench) -> None:
        """Hold ids, use ids and the names of notes are compared exactly, and come back exactly."""
        backend = await bench.backend()
        names = [name for name in NAMES if len(name.encode()) <= 255]
        token = await put(backend, max_uses=None)
        for name in names:
            use = Use(at=NOW, use_id=name)
            assert (await backend.present(by_key(token), use, NOW)).outcome is Outcome.RIGHT, name
            hold = Hold(hold_id=name, until=NOW + MINUTE)
            assert (await backend.present(by_key(token), hold, NOW)).outcome is Outcome.RIGHT
            assert await backend.note(name, name + "!") == name + "!"
        assert [hold.hold_id for hold in (await one(backend, token)).holds] == names
        for name in names:
            use = Use(at=NOW, use_id=name)
            assert (await backend.present(by_key(token), use, NOW)).outcome is Outcome.REPLAYED, name
            assert await backend.note(name, "") == name + "!"
        for number, name in enumerate(names):
            change = Release(hold_id=name) if number % 2 else UseHeld(hold_id=name, at=NOW)
            after = await backend.update(Match(id=token.id), change)
            assert after is not None
            assert [hold.hold_id for hold in after.holds] == names[number + 1 :]

    @case(6)
    async def test_every_byte_of_a_name_counts(self, bench: Bench) -> None:
        """Budgets, digests and contexts that differ in one bit, wherever it is, are apart."""
        backend = await bench.backend()
        same = Budget(object=b"a" * 16, name=b"a" * 16)
        budgets = [same._replace(object=one) for one in _with_one_bit_changed(same.object)]
        budgets += [same._replace(name=one) for one in _with_one_bit_changed(same.name)]
        for expected in (None, 0):
            for budget in budgets:
                assert (await backend.spend((a_spend(budget),), NOW)).full == expected
        values = _with_one_bit_changed(b"a" * 32)
        tokens = [await put(backend, {"digest": value}, slug="digest") for value in values]
        for value, token in zip(values, tokens, strict=True):
            assert await backend.find(Match(digests=(value,)), 9) == [token]
        tokens = [await put(backend, context=value, slug="context") for value in values]
        for value, token in zip(values, tokens, strict=True):
            assert await backend.find(Match(context=value, slug="context"), 9) == [token]


def _named(token: StoredToken, field: str, name: str) -> Match:
    """A token's key, under a name."""
    return where(digests=(token.keys[0].digest,), **{field: name})


def _writes(backend: TokenBackend, match: Match) -> list[Awaitable[object]]:
    return [
        backend.present(match, Use(at=NOW + 1), NOW),
        backend.update(match, SetExtraData("x")),
        backend.deactivate(match, NOW + 2),
    ]


def _with_one_bit_changed(value: bytes) -> list[bytes]:
    places = (0, len(value) // 2, len(value) - 1)
    return [
        value[:place] + bytes([value[place] ^ bit]) + value[place + 1 :]
        for place in places
        for bit in (1, 32, 128)
    ]
