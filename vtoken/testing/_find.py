"""The protocol's sentences about ``find`` and ``count``."""

from __future__ import annotations

from typing import Any

from vtoken.backend import NEVER, Match, SlugCount, StoredToken
from vtoken.testing._bench import NOW, Bench, Suite, a_digest, a_token, case, dice, find_all, where
from vtoken.testing._insert import ADD, put


def holds(match: Match, token: StoredToken) -> bool:
    """The condition, read off its docstring, sentence by sentence."""
    return (
        (match.id is None or token.id == match.id)
        and (match.digests is None or token.digest in match.digests)
        and (match.content_type is None or token.content_type == match.content_type)
        and (match.object_id is None or token.object_id == match.object_id)
        and (match.slug is None or token.slug == match.slug)
        and (not match.active or token.is_active)
        and (match.valid_at is None or valid(token, match.valid_at))
        and (match.context is None or token.context == match.context)
        and (match.lease_id is None or token.lease_id == match.lease_id)
        and (match.leased_at is None or token.lease_until > match.leased_at)
    )


def valid(token: StoredToken, at: int) -> bool:
    return token.is_active and token.expires_at >= at and token.lease_until <= at


class FindCases(Suite):
    """Cases of ``find`` and ``count``."""

    @case(11)
    async def test_find_is_newest_first(self, bench: Bench) -> None:
        """Newest first: by ``created_at``, then ``id``, both descending, whatever the order of insertion."""
        tokens = [a_token(created_at=NOW + n // 3 * 1000) for n in range(12)]
        shuffled = dice(1).sample(tokens, len(tokens))
        backend = await bench.backend()
        for token in shuffled:
            await backend.insert(token, ADD)
        expected = sorted(tokens, key=lambda token: (token.created_at, token.id), reverse=True)
        assert await backend.find(Match(), 99) == expected
        assert await backend.find(Match(object_id="42", slug="reset"), 99) == expected
        assert await backend.find(Match(active=True), 5) == expected[:5]

    @case(11)
    async def test_find_goes_on_after_a_page(self, bench: Bench) -> None:
        """``limit`` bounds a page, and ``after`` returns only what sorts after it: pages join without a
        gap."""
        backend = await bench.backend()
        tokens = [await put(backend, created_at=NOW + n // 3, object_id=str(n % 2)) for n in range(9)]
        for match in (Match(), Match(object_id="1"), Match(active=True, slug="reset")):
            whole = await backend.find(match, 99)
            assert whole == [token for token in reversed(tokens) if holds(match, token)]
            for limit in (1, 2, 4):
                joined: list[StoredToken] = []
                after = None
                while page := await backend.find(match, limit, after):
                    assert len(page) <= limit
                    joined += page
                    assert len(joined) <= len(whole)
                    after = (page[-1].created_at, page[-1].id)
                assert joined == whole
        assert await backend.find(Match(), 9, (NOW, "")) == []
        assert await backend.find(Match(), 9, (NOW + 3, "f" * 32)) == tokens[::-1]

    @case(6)
    async def test_every_given_field_must_hold(self, bench: Bench) -> None:
        """Every field of a ``Match`` that is given must hold; those left out do not matter."""
        backend = await bench.backend()
        choice = dice(7)
        tokens = [
            await put(
                backend,
                content_type=choice.choice("ab"),
                object_id=choice.choice("12"),
                slug=choice.choice(["", "s"]),
                is_active=choice.random() < 0.7,
                created_at=NOW + n,
                expires_at=choice.choice([NOW - 1, NOW, NOW + 1, NEVER]),
                context=choice.choice([b"", b"c" * 32]),
                lease_id=choice.choice(["", "l"]),
                lease_until=choice.choice([0, NOW - 1, NOW, NOW + 1]),
            )
            for n in range(60)
        ]
        tokens.reverse()
        digests = tuple(token.digest for token in choice.sample(tokens, 20))
        options: dict[str, list[Any]] = {
            "id": [tokens[3].id, "0" * 32],
            "digests": [digests, digests[:1], (a_digest("nobody"),)],
            "content_type": ["a", "A"],
            "object_id": ["1", "3"],
            "slug": ["", "s"],
            "active": [True],
            "valid_at": [NOW - 1, NOW, NOW + 1],
            "context": [b"", b"c" * 32, b"d"],
            "lease_id": ["", "l", "x"],
            "leased_at": [NOW - 2, NOW - 1, NOW, NOW + 1],
        }
        matches = [Match()] + [where(**{f: v}) for f, values in options.items() for v in values]
        for _ in range(60):
            fields = choice.sample(sorted(options), choice.randint(2, 4))
            matches.append(where(**{field: choice.choice(options[field]) for field in fields}))
        for match in matches:
            expected = [token for token in tokens if holds(match, token)]
            assert await backend.find(match, 99) == expected, match._asdict()

    @case(6)
    async def test_no_digest_matches_nothing(self, bench: Bench) -> None:
        """A token's digest is one of ``digests``: of none of them, where there are none."""
        backend = await bench.backend()
        token = await put(backend)
        assert await backend.find(Match(digests=()), 9) == []
        assert await backend.find(Match(digests=(), object_id="42"), 9) == []
        assert await backend.deactivate(Match(digests=()), NOW) == 0
        assert await find_all(backend) == [token]

    @case(6)
    async def test_empty_values_are_values(self, bench: Bench) -> None:
        """``""`` and ``b""`` are values to compare with, never "not given"."""
        backend = await bench.backend()
        await put(backend, context=b"c", lease_id="l")
        for field, value in (("id", ""), ("content_type", ""), ("object_id", ""), ("slug", "")):
            assert await backend.find(where(**{field: value}), 9) == [], field
        assert await backend.find(Match(context=b""), 9) == []
        assert await backend.find(Match(lease_id=""), 9) == []
        assert await backend.find(Match(valid_at=0), 9) != []
        assert await backend.find(Match(leased_at=0), 9) == []

    @case(11)
    async def test_count_tells_the_states_apart(self, bench: Bench) -> None:
        """``count`` puts each token into one of active, expired, used or none, by slug; no tokens, no
        line."""
        backend = await bench.backend()
        assert await backend.count(NOW) == []
        for slug in ("a", ""):
            await put(backend, slug=slug, expires_at=NOW)
            await put(backend, slug=slug, expires_at=NEVER, uses=1, max_uses=2)
            await put(backend, slug=slug, lease_id="l", lease_until=NOW + 1)
            await put(backend, slug=slug, expires_at=NOW - 1)
            await put(backend, slug=slug, expires_at=NOW - 1, is_active=False)
            await put(backend, slug=slug, is_active=False, uses=1)
            await put(backend, slug=slug, is_active=False, expires_at=NOW - 1, uses=2)
        await put(backend, slug="b", is_active=False)
        assert sorted(await backend.count(NOW)) == [
            SlugCount("", 7, 3, 1, 2),
            SlugCount("a", 7, 3, 1, 2),
            SlugCount("b", 1, 0, 0, 0),
        ]
