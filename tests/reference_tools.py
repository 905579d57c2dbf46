"""Random operations that a backend and the memory backend are both asked for, to compare their answers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from types import NoneType

from vtoken.backend import (
    NEVER,
    Budget,
    Change,
    Charge,
    ForgetKey,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Release,
    SetExtraData,
    Spend,
    State,
    StoredHold,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)

from .sqlite_tools import NOW, digest, key

Call = Callable[[TokenBackend], Awaitable[object]]
_NOT_INSERTED = (InsertResult.KEY_TAKEN, InsertResult.HAS_VALID)


class Player:
    """Makes up operations on a few objects, with times that meet and digests that clash."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311  # which operations, no secrets
        self.now = NOW
        self.number = 0
        self.features: dict[str, bool] = {}  # those that all operations of a batch have, or have not
        self.ids: list[str] = []
        self.charges: tuple[Charge, ...] = ()
        self.issued: list[bytes] = []
        self.digests = [digest(number) for number in range(60)]

    def has(self, feature: str) -> bool:
        return self.features.get(feature, self.chance.random() < 0.5)

    def fix_features(self) -> None:
        names = ("spends", "use id", "resets", "many digests", "overlap", "usual")
        self.features = {name: self.chance.random() < 0.5 for name in names}

    def operation(self) -> tuple[str, Call]:
        self.now += self.chance.choice([0, 0, 0, 1, 5, 40])
        kinds = [self.insert] * 7 + [self.present] * 12 + [self.update] * 4 + [self.deactivate, self.find]
        kinds += [self.find, self.purge, self.count, self.spend, self.refund, self.budgets, self.reset]
        kinds += [self.erase] * (self.chance.random() < 0.2) + [self.note]
        chosen = self.chance.choice(kinds)
        return chosen.__name__, chosen()

    def insert(self) -> Call:
        token, choice = self.token(), self.chance.choice
        mode = choice([*InsertMode, InsertMode.REPLACE, InsertMode.IF_NONE_VALID])
        keep = choice([self.now + 100, NEVER]) if self.has("overlap") else 0
        if "overlap" in self.features:
            mode = choice([InsertMode.REPLACE, InsertMode.IF_NONE_VALID, InsertMode.ONCE])
        wanted = self.now + choice([0, 0, 50, 500])
        taken: tuple[bytes, ...] = tuple(self.chance.sample(self.digests, choice([0, 0, 1, 2])))
        spends = self.spends()
        if "usual" in self.features:
            taken = () if self.features["usual"] else (digest(999),)
            token = token._replace(
                state=State.ACTIVE,
                ends_at=token.expires_at,
                uses=0,
                holds=(),
                keys=token.keys[:1] or (key(self.number, token.id, NEVER),),
            )
        return lambda backend: backend.insert(
            token, mode, keep_until=keep, wanted_until=wanted, also_taken=taken, spends=spends
        )

    def token(self) -> StoredToken:
        choice = self.chance.choice
        self.number += 1
        new_id = f"{0x1000 + self.number + choice([0, 0, 0, -2, 4]):016x}"
        self.ids.append(new_id)
        expires = NEVER if self.chance.random() < 0.3 else self.now + choice([0, 60, 1000, 5000])
        kinds = choice([["link"], ["link"], ["code"], ["link", "code"], []])
        digests = self.chance.sample(self.digests, len(kinds))
        self.issued += digests
        state = choice([State.ACTIVE] * 12 + list(State))
        max_uses = choice([1, 2, 3, None])
        hold = StoredHold(hold_id="h1", until=self.now + 70, use_id=choice(["", "x", "y"]), origin=new_id)
        return StoredToken(
            id=new_id,
            content_type=choice(["auth.user"] * 6 + ["vtoken:pretended"]),
            object_id=choice(["1", "1", "1", "2"]),
            slug=choice(["reset", "reset", "sms", ""]),
            context=choice([b"", b"", b"a" * 16, b"b" * 16]),
            is_beside=choice([False, False, True]),
            created_at=self.now,
            expires_at=expires,
            ends_at=expires if state is State.ACTIVE else min(expires, self.now - 1),
            state=state,
            extra_data=choice([None, None, "{}", '{"é\\u0000": [1e300, "\\""]}']),
            max_uses=max_uses,
            uses=0 if state is State.ACTIVE or max_uses is None else choice([0, max_uses]),
            used_at=0,
            keys=tuple(
                StoredKey(
                    digest=key_digest,
                    scheme="sha256",
                    secret_id="",
                    nonce="é",
                    plain_key=choice(["", "plain"]),
                    kind=kind,
                    expires_at=min(expires, self.now + choice([0, 30, 10_000, 10_000, 10_000])),
                    origin=new_id,
                )
                for kind, key_digest in zip(kinds, digests, strict=True)
            ),
            holds=choice([(), (), (), (), (hold,)]),
        )

    def key(self) -> Match:
        choice = self.chance.choice
        digests: tuple[bytes, ...] = (choice(self.issued[-3:] or self.digests),)
        if self.has("many digests"):
            digests = () if self.chance.random() < 0.1 else (choice(self.digests), *digests)
        return Match(
            digests=digests,
            kind=choice([None, None, None, "link", "code"]),
            content_type=choice(["auth.user", None]),
            object_id=choice(["1", None, None, None]),
            slug=choice(["reset", None, None, None]),
            context=choice([b"", None, None, None]),
        )

    def present(self, change_type: type[object] | None = None) -> Call:
        choice, key, now, spends = self.chance.choice, self.key(), self.now, self.spends()
        use_id = choice(["x", "x", "y"]) if self.has("use id") else ""
        change_type = change_type or choice([NoneType, Use, Use, Hold])
        resets = tuple(self.budget() for _ in range(choice([1, 2])))
        hold_id = choice(["h1", "h2", "h3"])
        until = now + choice([10, 60, 5_000, 3 * 86_400_000])
        changes: dict[type[object], Use | Hold | None] = {
            NoneType: None,
            Use: Use(at=now, use_id=use_id, resets=resets if self.has("resets") else ()),
            Hold: Hold(hold_id=hold_id, until=until, use_id=use_id),
        }
        change = changes[change_type]
        return lambda backend: backend.present(key, change, now, spends)

    def match(self) -> Match:
        choice = self.chance.choice
        kind = choice(["id", "digests", "object", "all"])
        if kind == "id":
            return Match(id=choice(self.ids) if self.ids else f"{1:016x}", slug=choice([None, "reset"]))
        if kind == "digests":
            return self.key()._replace(valid_at=choice([None, self.now]), active=choice([False, True]))
        of_object = Match(content_type="auth.user", object_id="1") if kind == "object" else Match()
        return of_object._replace(
            slug=choice([None, "reset", ""]),
            context=choice([None, b""]),
            active=choice([False, True]),
            valid_at=choice([None, self.now]),
        )

    def update(self) -> Call:
        choice = self.chance.choice
        match = self.match()
        while match.id is None and match.digests is None:
            match = self.match()
        if match.digests is not None and len(match.digests) != 1:
            match = match._replace(digests=match.digests[:1])
        budgets = (self.budget(),)
        changes: list[Change] = [
            UseHeld(hold_id="h1", at=self.now, use_id=choice(["", "x", "z"]), resets=budgets),
            UseHeld(hold_id=choice(["h1", "h2", "h3"]), at=self.now),
            Release(hold_id=choice(["h1", "h2"])),
            SetExtraData(extra_data=choice([None, '{"a": 1}'])),
            ForgetKey(),
        ]
        change = choice(changes)
        return lambda backend: backend.update(match, change)

    def deactivate(self) -> Call:
        match, at, sparing = self.match(), self.now, self.chance.choice([(), ("h1",), ("h1", "h2")])
        return lambda backend: backend.deactivate(match, at, sparing)

    def find(self) -> Call:
        match, limit = self.match(), self.chance.choice([1, 2, 100])
        after = self.chance.choice([None, None, *self.ids[-3:]])
        return lambda backend: backend.find(match, limit, after)

    def purge(self) -> Call:
        now, limit = self.now, self.chance.choice([1, 2, 100])
        before = now - self.chance.choice([-1, 300, 3000, 3000])
        return lambda backend: backend.purge(before, now, limit, now - 500)

    def count(self) -> Call:
        now = self.now

        async def count(backend: TokenBackend) -> object:
            return sorted(await backend.count(now))

        return count

    def budget(self) -> Budget:
        return Budget(
            object=self.chance.choice([b"o" * 16, b"p" * 16]),
            name=self.chance.choice([b"a", b"b", b"c"]) * 16,
        )

    def spends(self) -> tuple[Spend, ...]:
        budgets = list(
            dict.fromkeys(
                self.budget() for _ in range(self.chance.choice([1, 2, 3]) if self.has("spends") else 0)
            )
        )
        windows = [self.chance.choice([1, 50, 300]) for _ in budgets]
        return tuple(
            Spend(
                budget=budget,
                limit=self.chance.choice([1, 5, 9]),
                window=window,
                max_window=window * self.chance.choice([1, 4, 100]),
            )
            for budget, window in zip(budgets, windows, strict=True)
        )

    def spend(self) -> Call:
        spends, now = self.spends(), self.now + self.chance.choice([0, 0, 0, 100_000])

        async def spend(backend: TokenBackend) -> object:
            spending = await backend.spend(spends, now)
            self.charges = spending.charges or self.charges
            return spending

        return spend

    def refund(self) -> Call:
        charges = self.charges
        return lambda backend: backend.refund(charges)

    def budgets(self) -> Call:
        names = tuple(self.budget() for _ in range(4))
        return lambda backend: backend.budgets(names)

    def reset(self) -> Call:
        budget = self.budget()
        names = self.chance.choice([None, (budget.name,), (budget.name, b"?" * 16)])
        return lambda backend: backend.reset(budget.object, names)

    def erase(self) -> Call:
        budget = self.budget()
        return lambda backend: backend.erase("auth.user", "2", budget.object)

    def note(self) -> Call:
        name, text = self.chance.choice(["a", "b"]), self.chance.choice(["", "1", "2"])
        replace = self.chance.random() < 0.3
        return lambda backend: backend.note(name, text, replace=replace)


async def check_store(backend: TokenBackend, memory: TokenBackend) -> None:
    assert await backend.find(Match(), 1000) == await memory.find(Match(), 1000)


class MongoDBPlayer(Player):
    """Presents and inserts without limits, and purges all that is due.

    So it does not ask for what may differ on MongoDB: in what order purge takes tokens that ended at the same
    time, and, with :func:`as_told`, which of the two is told where a key is taken and a valid token is in the
    way.
    """

    is_free = False

    def spends(self) -> tuple[Spend, ...]:
        return () if self.is_free else super().spends()

    def present(self, change_type: type[object] | None = None) -> Call:
        self.is_free = True
        call = super().present(change_type)
        self.is_free = False
        return call

    def insert(self) -> Call:
        self.is_free = True
        call = super().insert()
        self.is_free = False
        return call

    def purge(self) -> Call:
        now = self.now
        before = now - self.chance.choice([-1, 300, 3000, 3000])
        return lambda backend: backend.purge(before, now, 1000, now - 500)


def as_told(answer: object) -> object:
    if isinstance(answer, Inserted) and answer.result in _NOT_INSERTED:
        return "not inserted"
    return answer
