"""Random calls of a backend, to be made on PostgreSQL and on memory alike."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from vtoken.backend import (
    Budget,
    Charge,
    ForgetKey,
    Hold,
    InsertMode,
    Match,
    Release,
    SetExtraData,
    Spend,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)

_OBJECTS: Final = ("1", "2")
_SLUGS: Final = ("", "reset")
_CONTEXTS: Final = (b"", b"a" * 32, b"b" * 32)
_BUDGETS: Final = tuple(
    Budget(object=bytes([owner]) * 16, name=bytes([name]) * 16) for owner in (0, 1) for name in (1, 2, 3)
)
_USE_IDS: Final = ("", "first", "first", "first", "second")
_HOLDS: Final = ("h1", "h2", "h3")
_START: Final = 1_000_000


class Call(NamedTuple):
    """A call of a backend that can be repeated on another."""

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    async def on(self, backend: TokenBackend) -> Any:
        method: Callable[..., Awaitable[Any]] = getattr(backend, self.name)
        answer = await method(*self.arguments, **self.keywords)
        return sorted(answer) if self.name == "count" else answer


class Calls:
    """Makes random calls on a small world, whose time goes on from call to call.

    Args:
        seed: of all choices.
        is_within: leave out the budgets that belong to no object, which an insert within a transaction of the
            application's own charges apart.
    """

    def __init__(self, seed: int, *, is_within: bool = False) -> None:
        self._budgets = [budget for budget in _BUDGETS if budget.object != bytes(16) or not is_within]
        self._random = random.Random(seed)  # noqa: S311  # these are no secrets
        self._next = 1
        self.now = _START
        self._digests: list[bytes] = []

    def call(self) -> Call:
        kinds: tuple[tuple[float, Callable[[], Call]], ...] = (
            (8, self._insert),
            (11, self._present),
            (5, self._update),
            (2, self._find),
            (1, self._deactivate),
            (0.7, self._purge),
            (2, self._spend),
            (1, self._refund),
            (1, self._reset),
            (0.3, self._erase),
            (1, self._count),
        )
        self.now += self._random.choice((0, 0, 1, 10, 100))
        make = self._random.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]
        return make()

    def _pick(self, values: Sequence[Any]) -> Any:
        return self._random.choice(values)

    def _id(self) -> str:
        return f"{self._random.randrange(1, self._next + 1):016x}"

    def _digest(self) -> bytes:
        new = bytes([self._random.randrange(256) for _ in range(32)])
        return self._pick(self._digests[-5:]) if self._digests and self._random.random() < 0.9 else new

    def _spends(self) -> tuple[Spend, ...]:
        count = self._pick((0, 0, 1, 2))
        return tuple(
            Spend(budget=budget, limit=self._pick((2, 4, 8)), window=100, max_window=self._pick((100, 400)))
            for budget in self._random.sample(self._budgets, count)
        )

    def _key(self, token_id: str, expires_at: int) -> StoredKey:
        digest = self._digest() if self._random.random() < 0.25 else self._new_digest()
        return StoredKey(
            digest=digest,
            scheme="sha256",
            secret_id="",
            nonce=self._pick(("", "n")),
            plain_key=self._pick(("", "p")),
            kind=self._pick(("link", "code", "code")),
            expires_at=min(expires_at, self.now + self._pick((50, 500, 5000))),
            origin=token_id,
        )

    def _new_digest(self) -> bytes:
        digest = self._random.randbytes(32)
        self._digests.append(digest)
        return digest

    def _insert(self) -> Call:
        mode = self._pick((*InsertMode, InsertMode.REPLACE, InsertMode.REPLACE))
        token_id = self._id() if self._random.random() < 0.05 else f"{self._next:016x}"
        self._next += 1
        expires_at = self.now + self._pick((50, 500, 5000))
        made = [self._key(token_id, expires_at) for _ in range(self._pick((1, 2)))]
        keys = {key.digest: key for key in made}
        state = self._pick((State.ACTIVE,) * 9 + (State.ENDED,))
        token = StoredToken(
            id=token_id,
            content_type="user",
            object_id=self._pick(_OBJECTS),
            slug=self._pick(_SLUGS),
            context=self._pick(_CONTEXTS),
            is_beside=mode is InsertMode.ADD,
            created_at=self.now,
            expires_at=expires_at,
            ends_at=expires_at if state is State.ACTIVE else self.now,
            state=state,
            extra_data=self._pick((None, None, '{"a":"ä\\u2028"}')),
            max_uses=self._pick((1, 1, 2, 3, None)),
            uses=0,
            used_at=0,
            keys=tuple(keys.values()),
            holds=(),
        )
        return Call(
            "insert",
            (token, mode),
            {
                "keep_until": self.now + self._pick((0, 100, 1000)),
                "wanted_until": self.now + self._pick((0, 100)),
                "also_taken": tuple(self._digest() for _ in range(self._pick((0, 0, 1)))),
                "spends": self._spends(),
            },
        )

    def _match(self) -> Match:
        return Match(
            digests=tuple(dict.fromkeys(self._digest() for _ in range(self._pick((1, 1, 2))))),
            kind=self._pick((None, None, None, None, "link", "code")),
            content_type=self._pick((None, "user")),
            object_id=self._pick((None, None, None, None, *_OBJECTS)),
            slug=self._pick((None, None, None, None, *_SLUGS)),
        )

    def _resets(self) -> tuple[Budget, ...]:
        return tuple(self._random.sample(self._budgets, self._pick((0, 0, 1))))

    def _present(self) -> Call:
        change = self._pick(
            (
                None,
                Use(at=self.now, use_id=self._pick(_USE_IDS), resets=self._resets()),
                Hold(
                    hold_id=self._pick(_HOLDS),
                    until=self.now + self._pick((10, 1000)),
                    use_id=self._pick(_USE_IDS),
                ),
            )
        )
        return Call("present", (self._match(), change, self.now, self._spends()), {})

    def _update(self) -> Call:
        hold = self._pick(_HOLDS)
        change = self._pick(
            (
                UseHeld(hold_id=hold, at=self.now, use_id=self._pick(_USE_IDS), resets=self._resets()),
                UseHeld(hold_id=hold, at=self.now),
                Release(hold_id=hold),
                SetExtraData(extra_data=self._pick((None, "{}"))),
                ForgetKey(),
            )
        )
        match = self._match() if self._random.random() < 0.6 else Match(id=self._id())
        return Call("update", (match, change), {})

    def _wide_match(self) -> Match:
        if self._random.random() < 0.4:
            return self._match()
        return Match(
            id=self._pick((None, None, self._id(), "no id")),
            content_type=self._pick((None, "user")),
            object_id=self._pick((None, *_OBJECTS)),
            slug=self._pick((None, *_SLUGS)),
            context=self._pick((None, *_CONTEXTS)),
            active=self._pick((False, True)),
            valid_at=self._pick((None, self.now)),
        )

    def _find(self) -> Call:
        after = self._pick((None, None, self._id(), "~"))
        return Call("find", (self._wide_match(), self._pick((1, 3, 100)), after), {})

    def _deactivate(self) -> Call:
        match = self._wide_match()
        if match.object_id is None and match.digests is None and self._random.random() < 0.7:
            match = match._replace(object_id=self._pick(_OBJECTS))
        return Call("deactivate", (match, self.now), {"sparing": self._pick(((), ("h1",), ("h1", "h2")))})

    def _purge(self) -> Call:
        before = self.now - self._pick((0, 200, 1000))
        return Call("purge", (before, self.now, 1000, before), {})

    def _spend(self) -> Call:
        return Call("spend", (self._spends(), self.now), {})

    def _refund(self) -> Call:
        charge = Charge(budget=self._pick(self._budgets), until=self.now + self._random.randrange(100))
        return Call("refund", ((charge,),), {})

    def _reset(self) -> Call:
        names = self._pick((None, (b"\1" * 16,), (b"\1" * 16, b"\2" * 16)))
        return Call("reset", (self._pick((b"\0" * 16, b"\1" * 16)), names), {})

    def _erase(self) -> Call:
        return Call("erase", ("user", self._pick(_OBJECTS), self._pick((b"\0" * 16, b"\1" * 16))), {})

    def _count(self) -> Call:
        return Call("count", (self.now,), {})


async def everything(backend: TokenBackend) -> tuple[Any, ...]:
    """What a backend holds, as far as the protocol shows it."""
    tokens = await backend.find(Match(), 10_000)
    return tuple(tokens), tuple(await backend.budgets(_BUDGETS))
