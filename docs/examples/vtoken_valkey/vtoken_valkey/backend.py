"""Verification tokens in Valkey, or in Redis 7.

1. Everything about one object is one value; a budget is one value. Small indexes lead to them.
2. An operation reads the values that it is about, works out the new ones in memory
   (:mod:`vtoken_valkey.draft`) and sends both to a script.
3. The script compares what was read with what is there, and writes if nothing has changed. Valkey runs one
   script at a time, so this is one atomic step.
4. Where something has changed, the operation begins again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, Final, Self, TypeVar, cast
from weakref import WeakValueDictionary

from vtoken import BackendUnavailable, ConfigurationError, InvalidInput
from vtoken.backend import (
    PRETENDED,
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    Match,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
    changed,
    is_valid,
    matches,
    running_holds,
)

from vtoken_valkey.connection import Connection
from vtoken_valkey.draft import Draft
from vtoken_valkey.records import StoredObject, dump_budget, dump_object, load_budget, load_object

_T = TypeVar("_T")

_PATIENCE: Final = 30.0
"""Seconds after which an operation that others overtake again and again is an error."""
_PAGE: Final = 500

# KEYS: those whose values were read. ARGV: how many they are, their values as read ("" for none), then the
# writes, each as a command's name, how many arguments it has, and those.
COMMIT: Final = """
local n = tonumber(ARGV[1])
for i = 1, n do
  local there = redis.call('GET', KEYS[i])
  if (there or '') ~= ARGV[1 + i] then return 0 end
end
local i = 2 + n
while i <= #ARGV do
  local count = tonumber(ARGV[i + 1])
  redis.call(ARGV[i], unpack(ARGV, i + 2, i + 1 + count))
  i = i + 2 + count
end
return 1
"""
NOTE: Final = """
local there = redis.call('HGET', KEYS[1], ARGV[1])
if ARGV[2] ~= '' and (ARGV[3] == '1' or not there) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  return ARGV[2]
end
return there or ''
"""

# Forgets budgets of an object: those that ARGV names after the object, or all of them.
RESET: Final = """
local names = {unpack(ARGV, 2)}
if #names == 0 then names = redis.call('SMEMBERS', KEYS[1]) end
local count = 0
for _, name in ipairs(names) do
  local member = ARGV[1] .. ':' .. name
  count = count + redis.call('DEL', 'vtoken:budget:' .. member)
  redis.call('ZREM', 'vtoken:budget-ends', member)
  redis.call('SREM', KEYS[1], name)
end
return count
"""


class ValkeyBackend:
    """A :class:`~vtoken.backend.TokenBackend` in one database of a Valkey server, for any number of
    processes.

    Needs asyncio.

    Args:
        url: ``valkey://[user:password@]host[:port][/number]``; ``valkeys://`` for TLS.
        durable: False works on a server that does not write each command to its disk before it answers
            (``appendfsync always``): a crash of the server may then lose tokens, and make used ones valid
            again.

    Raises:
        ConfigurationError: the URL is not understood.
    """

    def __init__(self, url: str, *, durable: bool = True) -> None:
        if not isinstance(durable, bool):
            raise ConfigurationError("durable must be True or False")
        self._connection = Connection(url, durable, (COMMIT, NOTE, RESET))
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        unknown = options.keys() - {"durable"}
        if unknown:
            raise ConfigurationError(f"the Valkey backend has no option {min(unknown)!r}; it has durable")
        return cls(url, **cast("dict[str, Any]", options))

    def __repr__(self) -> str:
        return "<ValkeyBackend>"

    async def open(self) -> None:
        await self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def ping(self) -> None:
        await self._connection.check()

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        run = self._connection.script
        return cast("bytes", await run(NOTE, ["vtoken:notes"], [name, text, "1" if replace else ""])).decode()

    def within(self, handle: object) -> TokenBackend:
        raise InvalidInput("using: Valkey has no transactions that an application could share; leave it out")

    # Tokens ------------------------------------------------------------------------------------

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        taken = (*(key.digest for key in token.keys), *also_taken)
        home = _object_key(token.content_type, token.object_id)

        def work(draft: Draft) -> Inserted:
            of = draft.objects[home]
            return draft.insert(of, token, mode, keep_until, wanted_until, taken, spends)

        budgets = [spend.budget for spend in spends]
        return await self._step(work, digests=taken, ids=[token.id], objects=[home], budgets=budgets)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        resets = change.resets if isinstance(change, Use) else ()
        budgets = [*(spend.budget for spend in spends), *resets]
        return await self._step(
            lambda draft: draft.present(key, change, now, spends),
            digests=key.digests or (),
            budgets=budgets,
        )

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        def work(draft: Draft) -> StoredToken | None:
            for of, token in draft.tokens():
                after = changed(token, change) if matches(token, match) else None
                if after is None:
                    continue
                of.tokens[token.id] = after
                if isinstance(change, UseHeld):
                    hold = next(hold for hold in token.holds if hold.hold_id == change.hold_id)
                    draft.used(of, after, hold.origin, change)
                return of.tokens[token.id]
            return None

        budgets = change.resets if isinstance(change, UseHeld) else ()
        ids = [] if match.id is None else [match.id]
        return await self._step(work, digests=match.digests or (), ids=ids, budgets=budgets)

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        found: list[StoredToken] = []
        async for token in self._matching(match, after):
            found.append(token)
            if len(found) == limit:
                break
        return found

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        objects: dict[str, list[str]] = {}
        async for token in self._matching(match, None):
            objects.setdefault(_object_key(token.content_type, token.object_id), []).append(token.id)
        count = 0
        for name in objects:

            def work(draft: Draft) -> int:
                ids = [token.id for _, token in draft.tokens() if matches(token, match)]
                return draft.deactivate(match, at, sparing, ids)

            count += await self._step(work, objects=[name])
        return count

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        name = _object_key(content_type, object_id)

        def work(draft: Draft) -> int:
            of = draft.objects[name]
            count = len(of.tokens)
            for token in list(of.tokens.values()):
                of.remove(token)
            return count

        count = await self._step(work, objects=[name])
        await self.reset(budgets_of, None)
        return count

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        tokens = await self._purge_tokens(before, now, limit)
        names = await self._connection.read(
            lambda client: client.zrangebyscore("vtoken:budget-ends", "-inf", budgets_before, 0, limit)
        )
        due = [
            Budget(object=bytes.fromhex(n[:32].decode()), name=bytes.fromhex(n[33:].decode())) for n in names
        ]

        def work(draft: Draft) -> int:
            over = [
                b for b, state in draft.budgets.items() if state is not None and state.until <= budgets_before
            ]
            for budget in over:
                draft.budgets[budget] = None
            return len(over)

        return Purged(tokens=tokens, budgets=await self._step(work, budgets=due) if due else 0)

    async def _purge_tokens(self, before: int, now: int, limit: int) -> int:
        """Delete what has ended, object by object, and pass over what is held."""
        purged = passed = 0
        while purged < limit:
            page = await self._connection.read(
                lambda client: client.zrangebyscore("vtoken:ends", "-inf", f"({before}", passed, _PAGE)  # noqa: B023  # awaited at once
            )
            if not page:
                break
            for some in _chunks([raw.decode() for raw in page], 100):
                chosen = some[: limit - purged]
                work = partial(_purge_these, ids=frozenset(chosen), before=before, now=now)
                gone, held = await self._step(work, ids=chosen)
                purged, passed = purged + gone, passed + held
                if purged == limit:
                    break
        return purged

    async def count(self, now: int) -> list[SlugCount]:
        counts: dict[str, SlugCount] = {}
        async for token in self._matching(Match(), None):
            if token.content_type == PRETENDED:
                continue
            old = counts.get(token.slug, SlugCount(slug=token.slug, total=0, active=0, expired=0, used=0))
            valid = is_valid(token, now)
            counts[token.slug] = old._replace(
                total=old.total + 1,
                active=old.active + valid,
                expired=old.expired + (token.is_active and not valid),
                used=old.used + (not token.is_active and token.uses > 0),
            )
        return list(counts.values())

    async def _matching(self, match: Match, after: str | None) -> AsyncIterator[StoredToken]:
        """The tokens that match, newest first. Without a digest, an id or an object the whole store is
        read."""
        if match.digests is not None or match.id is not None:
            names = await self._objects_of(match.digests or (), [] if match.id is None else [match.id])
        elif match.content_type is not None and match.object_id is not None:
            names = [_object_key(match.content_type, match.object_id)]
        else:
            async for token in self._all(after):
                if matches(token, match):
                    yield token
            return
        tokens = [token for of in (await self._read(names)).values() for token in of.tokens.values()]
        for token in sorted(tokens, key=lambda token: token.id, reverse=True):
            if matches(token, match) and (after is None or token.id < after):
                yield token

    async def _all(self, after: str | None) -> AsyncIterator[StoredToken]:
        while True:
            highest = "+" if after is None else f"({after}"
            page = await self._connection.read(
                lambda client: client.zrevrangebylex("vtoken:ids", highest, "-", 0, _PAGE)  # noqa: B023  # awaited at once
            )
            ids = [raw.decode() for raw in page]
            objects = await self._read(await self._objects_of((), ids))
            tokens = {token.id: token for of in objects.values() for token in of.tokens.values()}
            for token_id in ids:
                if token_id in tokens:
                    yield tokens[token_id]
            if len(ids) < _PAGE:
                return
            after = ids[-1]

    # Budgets -----------------------------------------------------------------------------------

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        budgets = [spend.budget for spend in spends]
        return await self._step(lambda draft: draft.spend(spends, now), budgets=budgets)

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._step(lambda draft: draft.refund(charges), budgets=[charge.budget for charge in charges])

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        raws = await self._values([_budget_key(name) for name in names])
        return [load_budget(raw) for raw in raws]

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        if names is not None and not names:
            self._connection.check_place()
            return 0
        arguments = [budgets_of.hex(), *(name.hex() for name in names or ())]
        run = self._connection.script
        return int(await run(RESET, [f"vtoken:budgets-of:{budgets_of.hex()}"], arguments, writes=True))

    # One step ----------------------------------------------------------------------------------

    async def _step(
        self,
        work: Callable[[Draft], _T],
        *,
        digests: Iterable[bytes] = (),
        ids: Iterable[str] = (),
        objects: Iterable[str] = (),
        budgets: Iterable[Budget] = (),
    ) -> _T:
        """Read, work, and write if nothing has changed meanwhile; else begin again.

        Args:
            work: changes the draft and returns the answer. It may be called several times.
            digests: the objects that have keys with these are read.
            ids: likewise those that have these tokens.
            objects: the names of further objects.
            budgets: the budgets that the work is about.
        """
        wanted, objects = list(dict.fromkeys(budgets)), list(objects)
        indexes = [*map(_digest_key, digests), *map(_id_key, ids)]
        # Callers of one process take turns where they are about the same thing: only other processes are left
        # to overtake them.
        name = next(iter([*objects, *indexes, *map(_budget_key, wanted)]), "")
        turn = self._turns.get(name) or self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            return await self._try(work, indexes, objects, wanted)

    async def _try(
        self, work: Callable[[Draft], _T], indexes: list[str], objects: list[str], wanted: list[Budget]
    ) -> _T:
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        pause = 0.001
        while True:
            pointers = await self._values(indexes)
            names = list(dict.fromkeys([*objects, *(raw.decode() for raw in pointers if raw)]))
            keys = [*names, *(_budget_key(budget) for budget in wanted)]
            raws = await self._values(keys)
            before = {name: load_object(raw) for name, raw in zip(names, raws, strict=False)}
            draft = Draft(
                {name: load_object(raw) for name, raw in zip(names, raws, strict=False)},
                {b: load_budget(raw) for b, raw in zip(wanted, raws[len(names) :], strict=True)},
            )
            states = dict(draft.budgets)
            answer = work(draft)
            writes = _writes(before, draft, states)
            if not writes:
                return answer
            read = dict(zip([*indexes, *keys], [*pointers, *raws], strict=True))
            arguments: list[Any] = [len(read), *(raw or b"" for raw in read.values())]
            for command, *values in writes:
                arguments += [command, len(values), *values]
            if await self._connection.script(COMMIT, list(read), arguments, writes=True):
                return answer
            if asyncio.get_running_loop().time() > deadline:
                raise BackendUnavailable("Valkey: other writers were quicker again and again")
            await asyncio.sleep(pause * random.random())  # noqa: S311  # no secret
            pause = min(pause * 2, 0.1)

    async def _objects_of(self, digests: Iterable[bytes], ids: Iterable[str]) -> list[str]:
        pointers = await self._values([*map(_digest_key, digests), *map(_id_key, ids)])
        return list(dict.fromkeys(raw.decode() for raw in pointers if raw))

    async def _read(self, names: list[str]) -> dict[str, StoredObject]:
        return {name: load_object(raw) for name, raw in zip(names, await self._values(names), strict=True)}

    def _values(self, keys: list[str]) -> Awaitable[list[bytes | None]]:
        async def nothing() -> list[bytes | None]:
            self._connection.check_place()
            return []

        return self._connection.read(lambda client: client.mget(keys)) if keys else nothing()


def _purge_these(draft: Draft, ids: frozenset[str], before: int, now: int) -> tuple[int, int]:
    """Remove those of these tokens that are due; how many they were, and how many are held."""
    gone = held = 0
    for of, token in draft.tokens():
        if token.id not in ids or token.ends_at >= before:
            continue
        if running_holds(token, now):
            held += 1
        else:
            of.remove(token)
            gone += 1
    return gone, held


def _writes(
    before: dict[str, StoredObject], draft: Draft, states: dict[Budget, BudgetState | None]
) -> list[tuple[Any, ...]]:
    """The commands that turn what was read into the draft."""
    writes: list[tuple[Any, ...]] = []
    for name, of in draft.objects.items():
        old = before[name]
        if of == old:
            continue
        raw = dump_object(of)
        writes.append(("SET", name, raw) if raw else ("DEL", name))
        old_digests = {key.digest for token in old.tokens.values() for key in token.keys}
        digests = {key.digest for token in of.tokens.values() for key in token.keys}
        writes += [("DEL", _digest_key(digest)) for digest in old_digests - digests]
        writes += [("SET", _digest_key(digest), name) for digest in digests - old_digests]
        for token_id in old.tokens.keys() - of.tokens.keys():
            writes += [("DEL", _id_key(token_id)), ("ZREM", "vtoken:ids", token_id)]
            writes.append(("ZREM", "vtoken:ends", token_id))
        for token in of.tokens.values():
            if token.id not in old.tokens:
                writes += [("SET", _id_key(token.id), name), ("ZADD", "vtoken:ids", 0, token.id)]
            if token.id not in old.tokens or old.tokens[token.id].ends_at != token.ends_at:
                writes.append(("ZADD", "vtoken:ends", token.ends_at, token.id))
    for budget, state in draft.budgets.items():
        if state == states[budget]:
            continue
        member, key = f"{budget.object.hex()}:{budget.name.hex()}", _budget_key(budget)
        of_object = f"vtoken:budgets-of:{budget.object.hex()}"
        if state is None:
            writes += [("DEL", key), ("ZREM", "vtoken:budget-ends", member)]
            writes.append(("SREM", of_object, budget.name.hex()))
        else:
            writes += [("SET", key, dump_budget(state)), ("ZADD", "vtoken:budget-ends", state.until, member)]
            writes.append(("SADD", of_object, budget.name.hex()))
    return writes


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _object_key(content_type: str, object_id: str) -> str:
    """A name of fixed size, whatever the object's id is."""
    joined = f"{len(content_type)}:{content_type}:{object_id}".encode()
    return f"vtoken:object:{hashlib.sha256(joined).hexdigest()}"


def _digest_key(digest: bytes) -> str:
    return f"vtoken:key:{digest.hex()}"


def _id_key(token_id: str) -> str:
    return f"vtoken:id:{token_id}"


def _budget_key(budget: Budget) -> str:
    return f"vtoken:budget:{budget.object.hex()}:{budget.name.hex()}"
