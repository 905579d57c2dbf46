"""Commands about the tokens of one object."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Annotated, Any

from cyclopts import Parameter

from vtoken.cli.options import AnySubjectText, Key, Slug, Store, SubjectText, Yes, any_subject_of, subject_of
from vtoken.cli.output import Result, pairs, printable, token_data, token_rows
from vtoken.cli.terminal import ask
from vtoken.config_read import convert, minutes
from vtoken.errors import InvalidInput
from vtoken.inputs import ANY, DEFAULT, Unset
from vtoken.subject import Subject


async def issue(
    subject: SubjectText,
    /,
    *,
    slug: Slug = None,
    expires_in: Annotated[
        str | None,
        Parameter(help='Lifetime in minutes, or "never". Left out: as the policy or the settings say.'),
    ] = None,
    extra: Annotated[str | None, Parameter(help="JSON to keep with the token.")] = None,
    store: Store = Store(),  # noqa: B008  # frozen: the form in which cyclopts takes shared options
) -> Result:
    """Issue a token and print its key; older ones of the same object and slug end."""
    expiration: float | Unset | None = DEFAULT
    if expires_in is not None:
        expiration = convert("--expires-in", minutes, expires_in)
    extra_data = None if extra is None else _from_json(extra)
    async with store.manager() as manager:
        token = await manager.deactivate_and_create(
            subject_of(subject), slug, extra_data, expiration_in_minutes=expiration
        )
    data = {**token_data(token), "key": token.key}
    return Result(data, pairs([*token_rows(token), ("key", token.key)]))


async def check(
    subject: SubjectText,
    key: Key,
    /,
    *,
    slug: Slug = None,
    store: Store = Store(),  # noqa: B008  # as above
) -> Result:
    """Check a key without consuming it. Exit status 1: it is not valid."""
    async with store.manager() as manager:
        token = await manager.verify(subject_of(subject), slug, key)
    return Result({"valid": True, **token_data(token)}, pairs([("valid", "yes"), *token_rows(token)]))


async def consume(
    subject: SubjectText,
    key: Key,
    /,
    *,
    slug: Slug = None,
    store: Store = Store(),  # noqa: B008  # as above
) -> Result:
    """Use a token: exactly one caller can. Exit status 1: the key is not valid."""
    async with store.manager() as manager:
        token = await manager.consume(subject_of(subject), slug, key)
    return Result({"valid": True, **token_data(token)}, pairs([("consumed", "yes"), *token_rows(token)]))


def deactivate(
    subject: AnySubjectText,
    /,
    *,
    slug: Annotated[str | None, Parameter(help="Only this purpose. Left out: every one.")] = None,
    yes: Yes = False,
    store: Store = Store(),  # noqa: B008  # as above
) -> Coroutine[Any, Any, Result]:
    """Deactivate the active tokens of an object, or of all objects of a content type.

    For all objects it asks; where there is no terminal it wants --yes.
    """
    found = any_subject_of(subject)
    if found.object_id is ANY:
        what = "tokens" if slug is None else f"{printable(slug)} tokens"
        question = f"Deactivate the {what} of every {printable(found.content_type)} in {store.shown()}?"
        ask(question, yes, without_terminal=False)
    return _deactivate(found, slug, store)


async def _deactivate(subject: Subject, slug: str | None, store: Store) -> Result:
    async with store.manager() as manager:
        count = await manager.deactivate(subject, ANY if slug is None else slug)
    return Result({"deactivated": count}, pairs([("deactivated", count)]))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # raised below, so that the text is not in the error's context
    raise InvalidInput("--extra is not JSON")
