"""The commands about one object: ``status``, ``history``, ``erase`` and ``reset-limits``."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from vtoken.cli.listing import tokens_table
from vtoken.cli.options import (
    AnySlug,
    Caller,
    Slug,
    Store,
    SubjectText,
    Yes,
    any_slug,
    checked_slug,
    subject_of,
)
from vtoken.cli.output import Result, iso, pairs, printable, state_of, token_data, when, without_policy
from vtoken.cli.terminal import ask
from vtoken.manager import TokenManager, utc_now
from vtoken.subject import Subject

_STORE = Store()  # the default of the shared options; it is frozen
_CALLER = Caller()


async def status(
    subject: SubjectText,
    /,
    *,
    slug: Slug = None,
    caller: Caller = _CALLER,
    store: Store = _STORE,
) -> Result:
    """Tell how an object stands: has it a valid token, how many attempts are left, when may it have a new
    one."""
    of, purpose = subject_of(subject), checked_slug(slug)
    async with store.opened() as manager:
        found = await manager.status(of, purpose, context=caller.context, by=caller.dimensions())
        note = without_policy(manager.policies, slug)
        is_known = note is None
        if caller.context is None and manager.policies.get(slug or "").needs_context:
            note = (
                "the policy binds tokens to a context: without --context the tokens of all contexts count,"
                " and the cooldown of none"
            )
    now = utc_now()
    data = {
        "has_valid": found.has_valid,
        "expires_at": iso(found.expires_at),
        "attempts_left": found.attempts_left,
        "attempts_reset_at": iso(found.attempts_reset_at),
        "can_issue_at": iso(found.can_issue_at),
        "code_expires_at": iso(found.code_expires_at),
        "note": note,
    }
    rows: list[tuple[str, object]] = [("valid token", "yes" if found.has_valid else "no")]
    if found.has_valid:
        rows.append(("expires", "never" if found.expires_at is None else when(found.expires_at, now)))
    if found.code_expires_at is not None:
        rows.append(("its code expires", when(found.code_expires_at, now)))
    unlimited = "any number" if is_known else "not known: see the note"
    rows.append(("attempts left", unlimited if found.attempts_left is None else found.attempts_left))
    if found.attempts_reset_at is not None:
        rows.append(("attempts reset", when(found.attempts_reset_at, now)))
    rows.append(("new token", "now" if found.can_issue_at <= now else when(found.can_issue_at, now)))
    if note is not None:
        rows.append(("note", note))
    return Result(data, pairs(rows))


async def history(subject: SubjectText, /, *, slug: AnySlug = None, store: Store = _STORE) -> Result:
    """List every stored token of an object, whatever its state, newest first."""
    of, purpose = subject_of(subject), any_slug(slug)
    async with store.opened() as manager:
        tokens = [token async for token in manager.history(of, purpose)]
    now = utc_now()
    data = {"tokens": [{"state": state_of(token, now), **token_data(token)} for token in tokens]}
    return Result(data, tokens_table(tokens, now))


def erase(subject: SubjectText, /, *, yes: Yes = False, store: Store = _STORE) -> Coroutine[Any, Any, Result]:
    """Delete every stored token of an object, and what is counted of its attempts (data protection)."""
    found, manager = subject_of(subject), store.made()
    question = f"Delete every token of {printable(subject)} in {store.shown(manager)}?"
    ask(question, yes, without_terminal=False)
    return _erase(found, store, manager)


async def _erase(subject: Subject, store: Store, manager: TokenManager) -> Result:
    async with store.opened(manager):
        count = await manager.erase(subject)
    return Result({"erased": count}, pairs([("erased", count)]))


async def reset_limits(subject: SubjectText, /, *, slug: AnySlug = None, store: Store = _STORE) -> Result:
    """Let an object's attempts and cooldowns start afresh: support unlocks an account."""
    of, purpose = subject_of(subject), any_slug(slug)
    async with store.opened() as manager:
        count = await manager.reset_limits(of, purpose)
    return Result({"reset": count}, pairs([("budgets reset", count)]))
