"""Storing tokens that come from a dump of another application."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple

from vtoken.backend import InsertMode, InsertResult, Match, StoredToken, TokenBackend
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.ids import IdSequence
from vtoken.migrate.receipts import ImportReceipt, import_receipt_name
from vtoken.migrate.stores import Progress, at_once, quiet

_CHUNK: Final = 500
"""Tokens that are stored between two entries in the receipt: some megabytes at most."""
_DRAWS: Final = 10


class Imported(NamedTuple):
    """How an import ended."""

    imported: int
    """Tokens that this run stored."""
    skipped: int
    """Tokens whose key the store has already."""
    taken_before: int
    """Tokens that an earlier import took and that the store does not hold any more: they ended and were
    purged. They are not taken again."""


async def import_tokens(
    backend: TokenBackend,
    tokens: Iterable[StoredToken],
    *,
    source: str,
    dump: str,
    now: int,
    progress: Progress = quiet,
) -> Imported:
    """Store the tokens of a dump beside those that are there.

    The store keeps a receipt of each source: until when its tokens were created that were taken. They are not
    taken again, so that nothing that was used or deactivated here since is ever valid again, whether the
    same dump is imported again or a newer one of the same application. An import that was interrupted goes
    on where it was.

    Args:
        backend: the store, open.
        tokens: the records, read as they are needed.
        source: the name of the application whose tokens these are.
        dump: a digest of the dump, in hexadecimal, by which it is known when it comes again.
        now: milliseconds since the epoch. A token that was created later is not covered by the receipt.
        progress: is told how many tokens were stored or skipped.

    Raises:
        InvalidInput: the import of another dump of this source was interrupted.
        BackendError: the store failed. Start again: what was stored stays.
    """
    name = import_receipt_name(source)
    receipt = await ImportReceipt.read(backend, name)
    if receipt.dump not in ("", dump):
        raise InvalidInput(
            "the import of another dump of this source was interrupted: run that one to its end first"
        )
    run = _Run(backend, receipt.floor)
    left = iter(tokens)
    done, newest = 0, receipt.floor
    while chunk := list(islice(left, _CHUNK)):
        interrupted_before = min(max(receipt.done - done, 0), len(chunk))
        await run.store(chunk[:interrupted_before], taken=True)
        await run.store(chunk[interrupted_before:], taken=False)
        done += len(chunk)
        newest = max(newest, *(token.created_at for token in chunk if token.created_at <= now), newest)
        if done > receipt.done:
            await ImportReceipt(floor=receipt.floor, dump=dump, done=done).write(backend, name)
        progress(done)
    await ImportReceipt(floor=newest).write(backend, name)
    return Imported(imported=run.imported, skipped=run.skipped, taken_before=run.taken_before)


async def check_secret(backend: TokenBackend, secret_ids: Sequence[str]) -> None:
    """Compare the secrets of an import with the one that the store's newest token was made with.

    Args:
        backend: the store, open.
        secret_ids: those of the import; none where it has no secret.

    Raises:
        ConfigurationError: it is another one, so that nobody could use what would be imported.
    """
    for newest in await backend.find(Match(), 1):
        made_with = {key.secret_id for key in newest.keys if key.secret_id}
        if secret_ids and made_with and made_with.isdisjoint(secret_ids):
            raise ConfigurationError(
                "the newest token of the store was made with another secret: give the import the secret of"
                " the application, or nobody could use what it stores"
            )


class _Run:
    """One import."""

    def __init__(self, backend: TokenBackend, floor: int) -> None:
        self._backend = backend
        self._floor = floor
        self.imported = self.skipped = self.taken_before = 0

    async def store(self, tokens: Sequence[StoredToken], *, taken: bool) -> None:
        """Store tokens, but for those that were taken before: all of these, or those up to the floor."""
        before = [token for token in tokens if taken or token.created_at <= self._floor]
        if before:
            digests = {key.digest for token in before for key in token.keys}
            there = await self._backend.find(Match(digests=tuple(digests)), len(digests))
            held = {key.digest for token in there for key in token.keys} & digests
            self.skipped += len(held)
            self.taken_before += len(before) - len(held)
        if not taken:
            await at_once([token for token in tokens if token.created_at > self._floor], self._store_one)

    async def _store_one(self, token: StoredToken) -> None:
        for _ in range(_DRAWS):
            if (await self._backend.insert(token, InsertMode.ADD)).result is InsertResult.INSERTED:
                self.imported += 1
                return
            if await self._backend.find(Match(digests=tuple(key.digest for key in token.keys)), 1):
                break
            token = with_id(token, IdSequence().next(token.created_at))  # another token has drawn the same id
        self.skipped += 1


def with_id(token: StoredToken, token_id: str) -> StoredToken:
    """A token that is not stored yet, with another id."""
    return token._replace(id=token_id, keys=tuple(key._replace(origin=token_id) for key in token.keys))
