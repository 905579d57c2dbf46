"""The commands ``issue``, ``check``, ``consume`` and ``deactivate``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

from cyclopts import Parameter

from vtoken.cli.options import (
    AnySlug,
    AnySubjectText,
    Caller,
    ExpiresIn,
    ExtraData,
    Key,
    PresentedSubjectText,
    Slug,
    Store,
    SubjectText,
    Yes,
    any_slug,
    any_subject_of,
    checked_slug,
    extra_data_of,
    lifetime,
    subject_of,
)
from vtoken.cli.output import Result, pairs, printable, token_data, token_rows, without_policy
from vtoken.cli.terminal import ask
from vtoken.errors import InvalidInput, InvalidToken
from vtoken.inputs import ANY, Wildcard
from vtoken.manager import TokenManager, utc_now
from vtoken.subject import Subject

_STORE = Store()  # the default of the shared options; it is frozen
_CALLER = Caller()


async def issue(
    subject: SubjectText,
    /,
    *,
    slug: Slug = None,
    expires_in: ExpiresIn = None,
    extra: ExtraData = None,
    add: Annotated[
        bool, Parameter(negative="", show_default=False, help="Leave the older tokens valid.")
    ] = False,
    caller: Caller = _CALLER,
    store: Store = _STORE,
) -> Result:
    """Issue a token and print its key, and of a pair its code; older ones of the same object and slug end."""
    found, purpose, expires = subject_of(subject), checked_slug(slug), lifetime(expires_in)
    extra_data = extra_data_of(extra)
    async with store.opened(may_make_it=True) as manager:
        token = await manager.issue(
            found,
            purpose,
            extra_data=extra_data,
            replace=not add,
            expires_in=expires,
            context=caller.context,
            by=caller.dimensions(),
        )
        note = without_policy(manager.policies, slug)
    data = {**token_data(token), "key": token.key, "code": token.code, "note": note}
    rows = [*token_rows(token, utc_now()), ("key", token.key)]
    if token.code is not None:
        rows.append(("code", token.code))
    if note is not None:
        rows.append(("note", note))
    return Result(data, pairs(rows))


async def check(
    subject: PresentedSubjectText,
    key: Key,
    /,
    *,
    slug: Slug = None,
    caller: Caller = _CALLER,
    store: Store = _STORE,
) -> Result:
    """Check a key without consuming it. Exit status 1: it is not valid."""
    found, purpose = any_subject_of(subject), checked_slug(slug)
    async with store.opened() as manager, _explained(manager, found, purpose):
        token = await manager.verify(found, purpose, key, context=caller.context, by=caller.dimensions())
    data = {"valid": True, **token_data(token)}
    return Result(data, pairs([("valid", "yes"), *token_rows(token, utc_now())]))


async def consume(
    subject: PresentedSubjectText,
    key: Key,
    /,
    *,
    slug: Slug = None,
    consume_id: Annotated[
        str | None,
        Parameter(help="A name for this use: the same one again, within 15 minutes, gives the same answer."),
    ] = None,
    caller: Caller = _CALLER,
    store: Store = _STORE,
) -> Result:
    """Use a token: exactly one caller can. Exit status 1: the key is not valid."""
    found, purpose = any_subject_of(subject), checked_slug(slug)
    async with store.opened() as manager, _explained(manager, found, purpose):
        token = await manager.consume(
            found,
            purpose,
            key,
            consume_id=consume_id,
            context=caller.context,
            by=caller.dimensions(),
        )
    data = {"valid": True, **token_data(token)}
    return Result(data, pairs([("consumed", "yes"), *token_rows(token, utc_now())]))


@asynccontextmanager
async def _explained(manager: TokenManager, subject: Subject, slug: str | None) -> AsyncGenerator[None]:
    """Tell the operator, beside a refusal, what may be wrong with the slug. Notes are shown by the
    application; people who present keys never see them."""
    try:
        yield
    except InvalidToken as error:
        note = without_policy(manager.policies, slug)
        if note is not None and slug is not None and error.reason == "unknown":
            error.add_note(note)
        if slug is None and error.reason == "unknown" and subject.object_id is not ANY:
            slugs = {token.slug async for token in manager.filter_active_tokens(subject)} - {None}
            if slugs:
                named = ", ".join(sorted(str(name) for name in slugs))
                error.add_note(f"the object has active tokens of the slugs {named}: see --slug")
        raise


def deactivate(
    subject: AnySubjectText | None = None,
    /,
    *,
    slug: AnySlug = None,
    token_id: Annotated[
        str | None, Parameter(name="--id", help="Only the token of this id, without SUBJECT.")
    ] = None,
    yes: Yes = False,
    store: Store = _STORE,
) -> Coroutine[Any, Any, Result]:
    """Deactivate an object's active tokens, or one token by its id.

    Those of all objects of a content type end only after a question, or with --yes.
    """
    if token_id is not None:
        if subject is not None or slug is not None:
            raise InvalidInput("--id names one token: leave out SUBJECT and --slug")
        return _deactivate_one(token_id, store)
    if subject is None:
        raise InvalidInput("give SUBJECT, or --id for one token")
    found, purpose, manager = any_subject_of(subject), any_slug(slug), store.made()
    if found.object_id is ANY:
        what = "tokens" if slug is None else f"{printable(slug)} tokens"
        where = store.shown(manager)
        question = f"Deactivate the {what} of every {printable(found.content_type)} in {where}?"
        ask(question, yes, without_terminal=False)
    return _deactivate(found, purpose, store, manager)


async def _deactivate(subject: Subject, slug: str | Wildcard, store: Store, manager: TokenManager) -> Result:
    async with store.opened(manager):
        count = await manager.deactivate(subject, slug, all_objects=subject.object_id is ANY)
    return Result({"deactivated": count}, pairs([("deactivated", count)]))


async def _deactivate_one(token_id: str, store: Store) -> Result:
    async with store.opened() as manager:
        token = await manager.get(token_id)
        if token is None:
            return Result({"deactivated": 0, "found": False}, "no token has this id", 1)
        count = await manager.deactivate(token)
    return Result({"deactivated": count, "found": True}, pairs([("deactivated", count)]))
