"""The sequential specifications of one object's tokens of one purpose, and of its attempt budget.

They are two objects, each of its own steps, so their histories are judged one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from tests.faults.linear import Operation, is_linearizable


class Tokens(NamedTuple):
    active: str = ""
    """The id of the active token, ``""`` for none; ``"?..."`` one whose issue was never acknowledged."""
    holds: frozenset[tuple[str, str]] = frozenset()
    """Token and the operation that holds it."""
    used: frozenset[tuple[str, str]] = frozenset()
    """Token and the name of its use."""
    gone: frozenset[str] = frozenset()
    """All that were active before."""

    def replaced(self) -> Tokens:
        """Without an active token; a hold on it goes on."""
        return self._replace(active="", gone=self.gone | {self.active})

    def ended(self) -> Tokens:
        """Without an active token and without holds."""
        return self.replaced()._replace(holds=frozenset())

    def after_use(self, token: str, name: str) -> Tokens:
        holds = frozenset(hold for hold in self.holds if hold[0] != token)
        state = self.replaced() if token == self.active else self
        return state._replace(used=state.used | {(token, name)}, holds=holds)

    def refusal(self, token: str) -> str:
        """Why a key is refused, ``""`` if it is not."""
        if token == self.active:
            return "leased" if any(token == held for held, _ in self.holds) else ""
        return "used" if any(token == used for used, _ in self.used) else "inactive"


Result = tuple[str, ...]


def is_sound(history: Sequence[Operation], cap: int | None, *, in_two_steps: bool = False) -> bool:
    """Say whether a history of one object has an explanation.

    Args:
        history: all of it.
        cap: how many wrong keys are compared; None for no cap.
        in_two_steps: the store may show that the old token has ended before the new one is active, and may
            count wrong keys after it let a right one through and before it is used.
    """
    compared = [operation for operation in history if operation.result != ("capped",)]
    if not is_linearizable(compared, OneToken(history, in_two_steps=in_two_steps)):
        return False
    if cap is None:
        return len(compared) == len(history)
    attempts = [operation for operation in history if operation.do in ("wrong", "verify", "consume")]
    return is_linearizable(attempts, AttemptBudget(history, cap, in_two_steps=in_two_steps))


class OneToken:
    """At most one token is active, and each is used once.

    Args:
        history: where the ids of acknowledged issues are looked up.
        in_two_steps: as of :func:`is_sound`.
    """

    def __init__(self, history: Iterable[Operation], *, in_two_steps: bool) -> None:
        self._issued = {o.result[1] for o in history if o.do == "issue" and o.result is not None}
        self._in_two_steps = in_two_steps

    def initial(self) -> Tokens:
        return Tokens()

    def only_looks(self, operation: Operation) -> bool:
        if operation.do == "consume":
            return operation.result not in (("ok",), None)
        return operation.do in ("verify", "wrong")

    def moves(self, state: Tokens, operation: Operation, done: int) -> Iterator[tuple[Tokens, int, bool]]:
        for after, progress, result in self._outcomes(state, operation, done):
            if result is None or operation.result in (None, result):
                yield after, progress, result is not None

    def _outcomes(
        self, state: Tokens, operation: Operation, done: int
    ) -> Iterator[tuple[Tokens, int, Result | None]]:
        """State, progress and, where the operation is done, its result."""
        if operation.do in ("issue", "ensure"):
            yield from self._issue(state, operation)
        elif operation.do == "deactivate":
            yield state.ended(), 0, (str(int(bool(state.active))),)
        elif operation.do == "final":
            for found in self._naming(state, operation.result[0] if operation.result else ""):
                yield found, 0, (found.active,)
        elif operation.do == "wrong":
            yield state, 0, ("unknown",)
        elif operation.do == "consume" and (operation.token, operation.name) in state.used:
            yield state, 0, ("ok",)
        elif done:  # the block ends
            is_held = (operation.token, operation.name) in state.holds
            after = state.after_use(operation.token, operation.name) if is_held else state
            yield after, 0, ("ok" if is_held else "lost",)
        elif refusal := state.refusal(operation.token):
            yield state, 0, (refusal,)
        elif operation.do == "redeem":
            yield state._replace(holds=state.holds | {(operation.token, operation.name)}), 1, None
        else:
            after = state if operation.do == "verify" else state.after_use(operation.token, operation.name)
            yield after, 0, ("ok",)

    def _issue(self, state: Tokens, operation: Operation) -> Iterator[tuple[Tokens, int, Result | None]]:
        named = operation.result[1] if operation.result else f"?{operation.name}"
        if operation.do == "ensure" and state.active:
            for found in self._naming(state, named) if operation.result else [state]:
                yield found, 0, ("ok", found.active)
            return
        if state.active and self._in_two_steps:
            yield state.replaced(), 0, None
        is_fresh = operation.do == "issue" or named not in self._issued
        if is_fresh and named not in state.gone and named != state.active:
            yield state.replaced()._replace(active=named), 0, ("ok", named)

    def _naming(self, state: Tokens, token: str) -> Iterator[Tokens]:
        """The state itself, or, where nobody knows the active token, with its id told now."""
        if state.active == token or not state.active.startswith("?"):
            yield state
        elif token and token not in self._issued | state.gone:
            yield state._replace(active=token)


_LET_THROUGH: Final = 1
"""How far a right key is that may be compared, and whose use is not made yet."""


class AttemptBudget:
    """How many wrong keys were counted. A right key costs nothing, and its use forgets them all.

    Args:
        history: where uses that were asked for twice are looked up.
        cap: how many wrong keys are compared.
        in_two_steps: the store may let a right key through first and use it later (decision 0012), so that
            wrong keys are counted in between.
    """

    def __init__(self, history: Iterable[Operation], cap: int, *, in_two_steps: bool) -> None:
        self._uses = Counter(operation.name for operation in history if operation.do == "consume")
        self._cap, self._in_two_steps = cap, in_two_steps

    def initial(self) -> int:
        return 0

    def only_looks(self, operation: Operation) -> bool:
        return operation.result is not None and not self._may_use(operation) and not _is_counted(operation)

    def moves(self, state: int, operation: Operation, done: int) -> Iterator[tuple[int, int, bool]]:
        result = operation.result
        if done == _LET_THROUGH:
            yield 0, 0, True
            return
        if self._may_use(operation) and self._uses[operation.name] > 1:
            yield state, 0, True  # answered again, which is neither limited nor counted
        if state >= self._cap:
            if result in (("capped",), None):
                yield state, 0, True
            return
        if result is None or _is_counted(operation):
            yield state + 1, 0, True
        if self._may_use(operation):
            yield (state, _LET_THROUGH, False) if self._in_two_steps else (0, 0, True)
        elif result is not None and not _is_counted(operation) and result != ("capped",):
            yield state, 0, True

    def _may_use(self, operation: Operation) -> bool:
        return operation.do == "consume" and operation.result in (("ok",), None)


def _is_counted(operation: Operation) -> bool:
    return operation.result in (("unknown",), ("inactive",))
