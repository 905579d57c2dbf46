"""The protocol's sentences about ``find`` and ``count``."""

from __future__ import annotations

from typing import Any

from vtoken.backend import (
    NEVER,
    PRETENDED,
    Hold,
    InsertMode,
    Match,
    Outcome,
    Release,
    SetExtraData,
    SlugCount,
    State,
    StoredToken,
    TokenBackend,
    Use,
    matches,
)
from vtoken.testing.cases.present import a_hold
from vtoken.testing.harness import NOW, Bench, Suite, a_digest, a_token, case, dice, find_all, put, where


async def pages(backend: TokenBackend, match: Match, limit: int) -> list[StoredToken]:
    """All pages of a search, joined."""
    found: list[StoredToken] = []
    after = None
    while page := await backend.find(match, limit, after):
        assert len(page) <= limit
        found += page
        after = found[-1].id
        assert len(found) < 1000, "the pages do not end"
    return found


def no_ids(token_id: str) -> list[str]:
    """Texts that are no token's id, though some contain the number of this one."""
    texts = [
        "zzz",
        "auth.user:42",
        "f" * 16,
        "f" * 255,
        "-1",
        "0",
        "0f0e0d0c-0b0a-4908-8706-050403020100",
        token_id.upper(),
        token_id.lstrip("0"),
        "0" + token_id,
        "0x" + token_id[2:],
        f" {token_id[1:]}",
        f"{token_id}\n",
        f"{token_id[:8]}_{token_id[9:]}",
        chr(0xFF10 + int(token_id[0])) + token_id[1:],  # a full-width digit
    ]
    return [text for text in texts if text != token_id]


class FindCases(Suite):
    """Cases of ``find`` and ``count``."""

    @case(11)
    async def test_find_is_newest_first(self, bench: Bench) -> None:
        """Newest first: by ``id``, descending, whatever the order of insertion, the times or the state."""
        choice = dice(1)
        numbers = [1, 2, 255, 256, 2**32 - 1, 2**32, 2**62, 2**63 - 1, *range(1000, 1004)]
        tokens = [a_token(id=f"{n:016x}", created_at=NOW + choice.randint(-5, 5)) for n in numbers]
        backend = await bench.backend()
        for token in choice.sample(tokens, len(tokens)):
            await backend.insert(token, InsertMode.ADD)
        tokens.sort(key=lambda token: token.id, reverse=True)
        assert await backend.find(Match(), 99) == tokens
        assert await backend.find(Match(object_id="42", slug="reset"), 99) == tokens
        assert await backend.find(Match(active=True), 5) == tokens[:5]

    @case(11)
    async def test_find_goes_on_after_a_page(self, bench: Bench) -> None:
        """``limit`` bounds a page, and ``after`` returns only what sorts after it, though that token be gone:
        pages join without a gap."""
        backend = await bench.backend()
        tokens = [await put(backend, object_id=str(n % 2), content_type="ab"[n // 2 % 2]) for n in range(9)]
        digests = tuple(token.keys[0].digest for token in tokens[:5])
        for match in (
            Match(),
            Match(object_id="1"),
            Match(content_type="a"),
            Match(active=True, slug="reset"),
            Match(digests=digests),
        ):
            whole = [token for token in reversed(tokens) if matches(token, match)]
            for limit in (1, 2, 4, 99):
                assert await pages(backend, match, limit) == whole
        assert await backend.find(Match(), 9, tokens[0].id) == []
        assert await backend.find(Match(), 9, f"{2**63 - 1:016x}") == tokens[::-1]
        assert await backend.find(Match(), 9, f"{0:016x}") == []
        assert await backend.find(Match(object_id="0"), 9, tokens[3].id) == [tokens[2], tokens[0]]

    @case(6)
    async def test_every_given_field_must_hold(self, bench: Bench) -> None:
        """Every field of a ``Match`` that is given must hold; those left out do not matter."""
        backend = await bench.backend()
        choice = dice(7)
        ends = [NOW - 1, NOW, NOW + 1, NEVER]
        tokens = [
            await put(
                backend,
                {"expires_at": choice.choice(ends)},
                {"kind": "code", "expires_at": choice.choice(ends), "origin": f"{1:016x}"},
                content_type=choice.choice("ab"),
                object_id=choice.choice("12"),
                slug=choice.choice(["", "s"]),
                state=choice.choice([State.ACTIVE, State.ACTIVE, *State]),
                expires_at=choice.choice(ends),
                context=choice.choice([b"", b"c" * 32]),
                is_beside=choice.random() < 0.3,
                holds=choice.choice([(), (a_hold("h"),)]),
            )
            for _ in range(60)
        ]
        tokens.reverse()
        keys = [choice.choice(token.keys).digest for token in choice.sample(tokens, 25)]
        options: dict[str, list[Any]] = {
            "id": [tokens[3].id, f"{0:016x}"],
            "digests": [tuple(keys), tuple(keys[:1]), (a_digest("nobody"),)],
            "kind": ["link", "code", "Link"],
            "content_type": ["a", "A"],
            "object_id": ["1", "3"],
            "slug": ["", "s"],
            "active": [True],
            "valid_at": [NOW - 1, NOW, NOW + 1],
            "context": [b"", b"c" * 32, b"d"],
        }
        conditions = [Match()] + [where(**{f: v}) for f, values in options.items() for v in values]
        for _ in range(80):
            fields = choice.sample(sorted(options), choice.randint(2, 4))
            conditions.append(where(**{field: choice.choice(options[field]) for field in fields}))
        for match in conditions:
            expected = [token for token in tokens if matches(token, match)]
            assert await backend.find(match, 99) == expected, match._asdict()

    @case(6)
    async def test_a_text_that_is_no_id_matches_nothing(self, bench: Bench) -> None:
        """An id is compared to the letter: in every method that takes one, a text that no token has as its id
        matches nothing, whatever a number in it would be."""
        backend = await bench.backend()
        token = await put(backend, id=f"{0xABC:016x}", holds=(a_hold("h"),))
        digests = (token.keys[0].digest,)
        for text in no_ids(token.id):
            match = Match(id=text)
            assert await backend.find(match, 9) == [], text
            assert await backend.find(match._replace(digests=digests), 9) == [], text
            assert await backend.update(match, SetExtraData("1")) is None, text
            assert await backend.update(match, Release("h")) is None, text
            assert await backend.deactivate(match, NOW) == 0, text
            for change in (None, Hold("h2", NOW + 1000), Use(NOW)):
                presented = await backend.present(match._replace(digests=digests), change, NOW)
                assert (presented.outcome, presented.token) == (Outcome.REFUSED, None), text
        assert await backend.find(Match(id=token.id), 9) == [token]

    @case(6)
    async def test_a_match_is_about_one_key(self, bench: Bench) -> None:
        """Digest, kind and expiry are tested on the same key, and ``valid_at`` on the token as well."""
        backend = await bench.backend()
        token = await put(
            backend,
            {"expires_at": NOW - 1},
            {"kind": "code", "expires_at": NOW + 9},
            expires_at=NOW + 5,
            holds=(a_hold("h"),),
        )
        link, code = (key.digest for key in token.keys)
        found: list[tuple[dict[str, Any], bool]] = [
            ({"digests": (link,)}, True),
            ({"digests": (link,), "valid_at": NOW - 1}, True),
            ({"digests": (link,), "valid_at": NOW}, False),
            ({"digests": (link,), "kind": "code"}, False),
            ({"digests": (code,), "kind": "code", "valid_at": NOW + 5}, True),
            ({"digests": (code,), "kind": "code", "valid_at": NOW + 6}, False),
            ({"digests": (link, code), "kind": "link", "valid_at": NOW}, False),
            ({"digests": (link, code), "valid_at": NOW}, True),
            ({"kind": "code"}, True),
            ({"kind": "neither", "valid_at": NOW}, True),
        ]
        for fields, is_found in found:
            assert await backend.find(where(**fields), 9) == [token] * is_found, fields

    @case(6)
    async def test_no_digest_matches_nothing(self, bench: Bench) -> None:
        """One of a token's keys has one of ``digests``: of none of them, where there are none."""
        backend = await bench.backend()
        tokens = [await put(backend), await put(backend, keys=())]
        assert await backend.find(Match(digests=()), 9) == []
        assert await backend.find(Match(digests=(), object_id="42"), 9) == []
        assert await backend.deactivate(Match(digests=()), NOW) == 0
        assert await find_all(backend) == tokens[::-1]

    @case(6)
    async def test_empty_values_are_values(self, bench: Bench) -> None:
        """``""`` and ``b""`` are values to compare with, never "not given"."""
        backend = await bench.backend()
        await put(backend, context=b"c")
        for field in ("id", "content_type", "object_id", "slug"):
            assert await backend.find(where(**{field: ""}), 9) == [], field
        assert await backend.find(Match(context=b""), 9) == []
        assert await backend.find(Match(valid_at=0), 9) != []

    @case(11)
    async def test_count_tells_the_states_apart(self, bench: Bench) -> None:
        """``count`` puts each token into one of active, expired, used or none, by slug; slugs without tokens,
        and those that stand for nobody, are left out."""
        backend = await bench.backend()
        assert await backend.count(NOW) == []
        for slug in ("a", ""):
            await put(backend, slug=slug, expires_at=NOW)
            await put(backend, slug=slug, expires_at=NEVER, uses=1, max_uses=2)
            await put(backend, slug=slug, holds=(a_hold("h"),))
            await put(backend, slug=slug, expires_at=NOW - 1)
            await put(backend, slug=slug, expires_at=NOW - 1, state=State.REPLACED)
            await put(backend, slug=slug, state=State.USED, uses=1)
            await put(backend, slug=slug, state=State.ENDED, expires_at=NOW - 1, uses=2, max_uses=3)
            await put(backend, slug=slug, state=State.ENDED, content_type=PRETENDED, uses=1)
        await put(backend, slug="b", state=State.ENDED)
        await put(backend, slug="c", state=State.ENDED, content_type=PRETENDED)
        counts = sorted(await backend.count(NOW))
        seven = SlugCount(slug="", total=7, active=3, expired=1, used=2)
        none = SlugCount(slug="b", total=1, active=0, expired=0, used=0)
        assert counts == [seven, seven._replace(slug="a"), none]
