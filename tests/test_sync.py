"""The manager for synchronous code: from threads, interrupted, and closed."""

from __future__ import annotations

import gc
import inspect
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import vtoken.manager
from vtoken import (
    AlreadyUsed,
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
    ContentTypes,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    Subject,
    TokenEvent,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken.sync import SyncTokenManager
from vtoken.testing.clock import Clock
from vtoken_backends.memory import MemoryBackend

from .core_tools import CODE, OTHER, SECRETS, USER, WRONG, Watched

CANARY = "canary-key-that-no-traceback-shows"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend() -> Watched:
    return Watched()


@pytest.fixture
def manager(backend: Watched, clock: Clock) -> Iterator[SyncTokenManager]:
    made = SyncTokenManager(TokenManager(backend, settings=SECRETS, policies=[CODE], clock=clock))
    with made:
        yield made


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call ``work`` in so many threads at once; the results in their order."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def portal_threads() -> int:
    return sum("portal" in thread.name for thread in threading.enumerate())


class TestMethods:
    def test_it_has_the_managers_parts(self, manager: SyncTokenManager) -> None:
        for name in ("backend", "settings", "policies", "content_types"):
            assert getattr(manager, name) is getattr(manager.manager, name)

    def test_it_has_the_managers_methods_with_their_parameters_and_docstrings(self) -> None:
        def methods(kind: type) -> set[str]:
            return {name for name in vars(kind) if name[0] != "_"}

        assert methods(SyncTokenManager) == methods(TokenManager) - {"aclose"} | {"close"}
        for name in methods(TokenManager) - {"aclose", "open", "from_url", "from_env"}:
            ours, theirs = getattr(SyncTokenManager, name), getattr(TokenManager, name)
            assert inspect.signature(ours) == inspect.signature(theirs)
            assert ours.__doc__ == theirs.__doc__ or name == "content_object"
        assert inspect.signature(SyncTokenManager.from_env) == inspect.signature(TokenManager.from_env)

    def test_the_life_of_a_token(self, manager: SyncTokenManager, clock: Clock) -> None:
        issued = manager.deactivate_and_create(USER, "reset", {"n": 1})
        assert manager.exists_valid(USER, "reset", issued.key)
        assert manager.verify(USER, "reset", issued.key) == issued
        assert manager.get_active_or_create(USER, "reset") == issued
        issued.set_extra_data({"n": 2})
        manager.save(issued)
        loaded = manager.get(issued.id)
        assert loaded is not None
        assert loaded.get_extra_data() == {"n": 2}
        assert manager.consume(USER, "reset", issued.key, consume_id="c") == issued
        with pytest.raises(InvalidToken):
            manager.consume(USER, "reset", issued.key)
        assert len(manager.generate_key()) == 32
        assert manager.stats().used == 1
        manager.deactivate_and_create(OTHER)
        assert manager.deactivate(OTHER) == 1
        clock.advance(timedelta(seconds=1))
        assert manager.purge(batch_size=1) == 2

    def test_what_is_around_a_token(self, manager: SyncTokenManager, clock: Clock) -> None:
        first = manager.issue(USER, "login", expires_in="5m")
        manager.pretend(OTHER, "login")
        for _ in range(2):
            with pytest.raises(InvalidToken):
                manager.verify(USER, "login", f"{(int(first.key) + 1) % 10**6:06}")
        status = manager.status(USER, "login")
        assert (status.has_valid, status.expires_at, status.attempts_left) == (True, first.expires_at, 3)
        assert manager.reset_limits(USER, "login") == 1
        assert manager.status(USER, "login").attempts_left == 5
        second = manager.issue(USER, "login")
        assert [token.id for token in manager.history(USER)] == [second.id, first.id]
        assert manager.ping() >= 0
        with pytest.raises(ConfigurationError, match="derived"):
            manager.reveal(second)
        assert manager.erase(USER) == 2
        assert list(manager.history(USER)) == []
        with pytest.raises(InvalidInput):
            manager.mark_used(second, using=object())

    def test_an_issue_that_could_not_be_sent_is_taken_back(self, manager: SyncTokenManager) -> None:
        with manager.issuing(USER, "reset") as sent:
            assert manager.exists_valid(USER, "reset", sent.key)

        def fail() -> None:
            with manager.issuing(USER, "other") as lost:
                assert manager.exists_valid(USER, "other", lost.key)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert [token.id for token in manager.filter_active_tokens(USER)] == [sent.id]

    @pytest.mark.parametrize(("error", "again"), [(ZeroDivisionError(), True), (KeyboardInterrupt(), False)])
    def test_an_exception_gives_the_cooldown_back_and_an_interruption_does_not(
        self, backend: Watched, error: BaseException, again: bool
    ) -> None:
        def block(manager: SyncTokenManager) -> None:
            with manager.issuing(USER, "reset"):
                raise error

        cooling = TokenPolicy.link("reset", cooldown="1m")
        with SyncTokenManager(TokenManager(backend, policies=[cooling])) as manager:
            with pytest.raises(type(error)):
                block(manager)
            assert not manager.exists_valid(USER, "reset")
            if again:
                manager.issue(USER, "reset")
            else:
                with pytest.raises(CooldownActive):
                    manager.issue(USER, "reset")

    @pytest.mark.parametrize("count", [0, 1, 256, 600])
    def test_many_at_once(self, manager: SyncTokenManager, count: int) -> None:
        me, told = threading.get_ident(), list[int]()

        def subjects() -> Iterator[Subject]:
            for number in range(count):
                assert threading.get_ident() == me  # a cursor of a database may belong to its thread
                yield Subject("auth.user", number)

        tokens = list(manager.issue_many(subjects(), "invite", progress=told.append))
        assert [token.object_id for token in tokens] == [str(number) for number in range(count)]
        assert (told or [0])[-1] == manager.stats().total == count

    def test_many_at_once_from_an_async_iterable(self, manager: SyncTokenManager) -> None:
        async def subjects() -> AsyncIterator[Subject]:
            for number in range(3):
                await anyio.lowlevel.checkpoint()
                yield Subject("auth.user", number)

        assert len(list(manager.issue_many(subjects(), "invite", replace=False))) == 3

    def test_active_tokens_come_one_by_one(self, manager: SyncTokenManager) -> None:
        ids = [manager.deactivate_and_create(USER, deactivate_old_tokens=False).id for _ in range(205)]
        iterator = manager.filter_active_tokens(USER)
        assert next(iterator).id == ids[-1]
        assert [token.id for token in iterator] == ids[-2::-1]
        assert list(manager.filter_active_tokens(OTHER)) == []

    @pytest.mark.parametrize("by", ["break", "close", "error"])
    @pytest.mark.parametrize("kind", ["issue_many", "issue_many of an async iterable", "history"])
    def test_what_is_left_early_is_closed_at_once(
        self, manager: SyncTokenManager, monkeypatch: pytest.MonkeyPatch, kind: str, by: str
    ) -> None:
        ended: list[str] = []
        module, name = (TokenManager, "_pages") if kind == "history" else (vtoken.manager, "_groups")
        inner = getattr(module, name)

        async def watched(*args: Any) -> AsyncIterator[Any]:
            try:
                async for item in inner(*args):
                    yield item
            finally:
                for _ in range(100):
                    await anyio.lowlevel.checkpoint()
                ended.append(threading.current_thread().name)

        async def subjects() -> AsyncIterator[Subject]:
            for number in range(9):
                yield Subject("auth.user", number)

        monkeypatch.setattr(module, name, watched)
        manager.issue(USER)
        many = subjects() if kind.endswith("iterable") else [USER, OTHER]
        tokens = manager.history(USER) if kind == "history" else manager.issue_many(many, "invite")
        next(tokens)
        assert ended == []
        if by == "close":
            tokens.close()
        elif by == "break":
            del tokens
        else:
            with pytest.raises(ZeroDivisionError):
                tokens.throw(ZeroDivisionError())
        assert len(ended) == 1
        assert "portal" in ended[0]

    def test_what_is_left_after_the_manager_was_closed(self, backend: Watched) -> None:
        with SyncTokenManager(TokenManager(backend)) as manager:
            manager.issue(USER, "invite")
            tokens = manager.history(USER)
            assert next(tokens).slug == "invite"
        tokens.close()

    def test_an_iterable_that_fails_ends_many_at_once(self, manager: SyncTokenManager) -> None:
        subjects = (Subject("auth.user", 1 // number) for number in (1, 0))
        with pytest.raises(ZeroDivisionError):
            list(manager.issue_many(subjects, "invite"))
        with pytest.raises(InvalidInput):
            list(manager.issue_many([Subject("auth.user")], "invite"))

    @pytest.mark.parametrize("is_async", [True, False])
    def test_content_object(self, is_async: bool) -> None:
        threads: list[int] = []

        async def load_later(object_id: str) -> str:
            await anyio.lowlevel.checkpoint()
            return f"user {object_id}"

        def load(object_id: str) -> Any:
            threads.append(threading.get_ident())
            return load_later(object_id) if is_async else f"user {object_id}"

        types = ContentTypes()
        types.register(str, "auth.user", get_id=lambda user: user, load=load)
        with SyncTokenManager.from_url("memory://", content_types=types) as manager:
            issued = manager.deactivate_and_create("7")
            assert manager.content_object(issued) == "user 7"
            with pytest.raises(ConfigurationError, match="load="):
                manager.content_object(manager.issue(Subject("auth.other", 1)))
        assert threads == [threading.get_ident()]
        with pytest.raises(BackendClosed):
            manager.content_object(issued)

    def test_from_env(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VTOKEN_URL", "memory://")
        with SyncTokenManager.from_env(policies=[TokenPolicy("a", max_uses=2)]) as manager:
            assert manager.deactivate_and_create(USER, "a").max_uses == 2
            assert repr(manager) == "<SyncTokenManager on <MemoryBackend>>"
        monkeypatch.delenv("VTOKEN_URL")
        assert repr(SyncTokenManager.from_env("memory://")) == "<SyncTokenManager on <MemoryBackend>>"

    def test_errors_come_out_as_they_are(self, manager: SyncTokenManager, backend: Watched) -> None:
        backend.failing["find"] = BackendUnavailable("no server")
        with pytest.raises(BackendUnavailable, match="no server"):
            manager.get("x")
        with pytest.raises(InvalidInput):
            manager.exists_valid(USER, key=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
        with pytest.raises(InvalidInput):
            list(manager.filter_active_tokens(USER, "login", "000000"))
        with pytest.raises(TypeError):
            manager.stats("nonsense")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # the mistake

    def test_the_sweeper_runs_beside_a_plain_block(self, manager: SyncTokenManager, backend: Watched) -> None:
        purged = threading.Event()

        async def note() -> None:
            purged.set()

        backend.after["purge"] = note
        with manager.sweeper(timedelta(milliseconds=1)):
            assert purged.wait(30)

    def test_a_real_store(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/tokens.db"
        with SyncTokenManager.from_url(url) as manager:
            issued = manager.deactivate_and_create(USER, "reset")
        with manager:  # once more, with an event loop of its own
            with manager.redeem(USER, "reset", issued.key) as token:
                assert token == issued
            assert manager.stats().used == 1


class TestRedeem:
    def test_the_token_is_used_when_the_block_ends(self, manager: SyncTokenManager) -> None:
        issued = manager.deactivate_and_create(USER, "reset")
        with manager.redeem(USER, "reset", issued.key) as token:
            assert token == issued
            with pytest.raises(InvalidToken), manager.redeem(USER, "reset", issued.key):
                pytest.fail("two leases")
        assert manager.stats().used == 1

    @pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), StopIteration(1)])
    def test_an_exception_gives_it_back(self, manager: SyncTokenManager, error: BaseException) -> None:
        issued = manager.deactivate_and_create(USER, "reset")

        def block() -> None:
            with manager.redeem(USER, "reset", issued.key):
                raise error

        with pytest.raises(type(error)) as info:
            block()
        assert info.value is error
        assert manager.consume(USER, "reset", issued.key) == issued

    def test_deactivating_inside_the_block_spares_the_blocks_own_hold(
        self, manager: SyncTokenManager
    ) -> None:
        issued = manager.issue(USER, "reset")
        with manager.redeem(USER, "reset", issued.key):
            assert manager.deactivate(USER) == 1
        found = manager.get(issued.id)
        assert found is not None
        assert found.uses == 1
        other = manager.issue(USER, "reset")
        told = pytest.raises(LeaseLost)
        with told, manager.redeem(USER, "reset", other.key), ThreadPoolExecutor(1) as pool:
            pool.submit(manager.deactivate, USER).result()  # outside, as the thread knows no block

    def test_blocks_in_blocks(self, manager: SyncTokenManager) -> None:
        one, other = manager.issue(USER, "one"), manager.issue(USER, "other")
        with manager.redeem(USER, "one", one.key):
            with manager.redeem(USER, "other", other.key):
                assert manager.deactivate(USER) == 2
            third = manager.issue(USER, "one")
            assert manager.deactivate(USER) == 1
        assert [token.uses for token in manager.history(USER)] == [0, 1, 1]
        with manager.redeem(OTHER, "one", manager.issue(OTHER, "one").key):
            assert manager.deactivate(third) == 0

    def test_a_block_that_is_left_in_another_thread(self, manager: SyncTokenManager) -> None:
        issued = manager.issue(USER, "reset")
        block = manager.redeem(USER, "reset", issued.key)
        block.__enter__()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(block.__exit__, None, None, None).result()
        assert manager.stats().used == 1

    def test_a_second_click_waits_and_is_told_of_success(self, manager: SyncTokenManager) -> None:
        issued, entered = manager.issue(USER, "reset"), threading.Event()

        def second() -> None:
            entered.wait()
            with manager.redeem(USER, "reset", issued.key, consume_id="form", wait="30s"):
                pytest.fail("entered")

        with ThreadPoolExecutor(1) as pool:
            clicked = pool.submit(second)
            with manager.redeem(USER, "reset", issued.key, consume_id="form"):
                entered.set()
            with pytest.raises(AlreadyUsed):
                clicked.result(30)

    def test_a_lost_lease_is_told(self, manager: SyncTokenManager, clock: Clock) -> None:
        issued = manager.deactivate_and_create(USER, "reset")
        with pytest.raises(LeaseLost), manager.redeem(USER, "reset", issued.key, lease=timedelta(seconds=9)):
            clock.advance(timedelta(seconds=10))

    def test_a_wrong_key_never_enters(self, manager: SyncTokenManager) -> None:
        with pytest.raises(InvalidToken), manager.redeem(USER, "reset", WRONG):
            pytest.fail("entered")
        with pytest.raises(InvalidInput), manager.redeem(USER, "reset", WRONG, lease=timedelta(0)):
            pytest.fail("entered")
        assert not manager._blocks  # pyright: ignore[reportPrivateUsage]  # a leak shows nowhere else

    def test_closing_in_the_block_gives_it_back(self, manager: SyncTokenManager, backend: Watched) -> None:
        async def slow() -> None:
            for _ in range(50):
                await anyio.lowlevel.checkpoint()

        backend.before["update"] = slow
        issued = manager.deactivate_and_create(USER, "reset")
        told = pytest.raises(BackendClosed, match="before the block was done")
        with told, manager.redeem(USER, "reset", issued.key):
            manager.close()
        manager.open()
        assert manager.consume(USER, "reset", issued.key) == issued

    def test_closing_in_the_block_hides_no_error_of_the_block(self, manager: SyncTokenManager) -> None:
        issued = manager.deactivate_and_create(USER, "reset")

        def block() -> None:
            with manager.redeem(USER, "reset", issued.key):
                manager.close()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            block()

    def test_closing_while_another_thread_enters_its_block(
        self, backend: Watched, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        issued = manager.deactivate_and_create(USER, "reset")
        opened = manager._opened  # pyright: ignore[reportPrivateUsage]  # where the other thread comes in

        def closed_just_afterwards() -> Any:
            running = opened()
            monkeypatch.undo()
            manager.close()
            return running

        def enter() -> None:
            with manager.redeem(USER, "reset", issued.key):
                pass

        def attempt() -> None:
            with pytest.raises(BackendClosed):
                enter()
            done.set()

        monkeypatch.setattr(manager, "_opened", closed_just_afterwards)
        done = threading.Event()
        threading.Thread(target=attempt, daemon=True).start()
        assert done.wait(10)

    def test_closing_while_another_thread_is_in_its_block(self, manager: SyncTokenManager) -> None:
        issued = manager.deactivate_and_create(USER, "reset")
        entered, closed = threading.Event(), threading.Event()

        def block() -> None:
            with manager.redeem(USER, "reset", issued.key):
                entered.set()
                closed.wait(30)

        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(block)
            assert entered.wait(30)
            manager.close()
            closed.set()
            with pytest.raises(BackendClosed):
                task.result(30)
        manager.open()
        assert manager.exists_valid(USER, "reset", issued.key)


class TestThreads:
    def test_one_of_many_wins(self, manager: SyncTokenManager) -> None:
        issued = manager.deactivate_and_create(USER, "reset")

        def consume(_: int) -> bool:
            try:
                manager.consume(USER, "reset", issued.key)
            except InvalidToken:
                return False
            return True

        assert sum(in_threads(16, consume)) == 1

    def test_one_of_many_redeems(self, manager: SyncTokenManager) -> None:
        issued = manager.deactivate_and_create(USER, "reset")
        done: list[int] = []

        def redeem(number: int) -> None:
            try:
                with manager.redeem(USER, "reset", issued.key):
                    done.append(number)
            except InvalidToken:
                pass

        in_threads(16, redeem)
        assert len(done) == 1
        assert manager.stats().used == 1

    def test_the_cap_holds(self, manager: SyncTokenManager) -> None:
        def guess(number: int) -> str:
            try:
                manager.verify(USER, "login", f"{number:06}")
            except TooManyAttempts:
                return "capped"
            except InvalidToken:
                return "refused"
            return "in"

        assert in_threads(12, guess).count("refused") == 5

    def test_opened_and_closed_by_all_at_once(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        in_threads(8, lambda _: manager.open())
        assert backend.calls.count("open") == 1
        in_threads(8, lambda _: manager.close())
        assert backend.calls.count("close") == 1
        assert portal_threads() == 0

    def test_blocks_may_be_nested(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        with manager:
            with manager:
                manager.issue(USER, "reset")
            assert manager.exists_valid(USER, "reset")
        assert backend.calls.count("open") == backend.calls.count("close") == 1


class TestOpensItself:
    """As a global of a module, which nobody opens."""

    def test_once_for_all_threads(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        in_threads(8, lambda number: manager.issue(Subject("auth.user", number), "reset"))
        assert backend.calls.count("open") == 1
        assert manager.stats().total == 8
        manager.close()
        assert backend.calls.count("close") == 1
        with pytest.raises(BackendClosed, match="not open"):
            manager.stats()

    def test_whatever_is_called_first(self) -> None:
        types = ContentTypes()
        types.register(str, "auth.user", get_id=lambda user: user, load=lambda object_id: object_id)
        made = [SyncTokenManager.from_url("memory://", content_types=types) for _ in range(4)]
        assert list(made[0].history(USER)) == []
        with pytest.raises(InvalidToken), made[1].redeem(USER, "reset", WRONG):
            pytest.fail("entered")
        assert [token.object_id for token in made[2].issue_many([USER])] == [str(USER.object_id)]
        with made[2] as other:
            token = other.issue(USER)
        assert made[3].content_object(token) == str(USER.object_id)
        assert made[2].exists_valid(USER), "a block beside does not close it"
        for manager in made:
            manager.close()

    def test_it_tries_again_where_the_store_was_away(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        backend.failing["open"] = BackendUnavailable("no server")
        for _ in range(2):
            with pytest.raises(BackendUnavailable):
                manager.stats()
        assert portal_threads() == 0
        backend.failing.clear()
        assert manager.stats().total == 0
        manager.close()

    def test_forgotten_it_closes_without_a_warning(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        manager.stats()
        del manager
        gc.collect()
        assert backend.calls.count("close") == 1


class TestContexts:
    def test_a_callable_that_is_not_async_runs_in_the_callers_thread(self) -> None:
        threads: list[int] = []
        policies = [TokenPolicy.link("confirm", context="required")]
        manager = SyncTokenManager.from_url("memory://", policies=policies)

        def address(object_id: str) -> dict[str, str]:
            threads.append(threading.get_ident())
            assert manager.exists_valid(OTHER, "other"), "it may use the manager itself"
            return {"address": f"{object_id}@example.org"}

        async def same(object_id: str) -> dict[str, str]:
            return {"address": f"{object_id}@example.org"}

        with manager:
            manager.issue(OTHER, "other")
            issued = manager.issue(USER, "confirm", context=address)
            assert manager.verify(USER, "confirm", issued.key, context=same) == issued
            kind = Subject(USER.content_type)
            assert manager.verify(kind, "confirm", issued.key, context=lambda pk: same(pk)) == issued
            with manager.redeem(kind, "confirm", issued.key, context=address) as token:
                assert token == issued
            assert len(list(manager.issue_many([USER, OTHER], "confirm", context=address))) == 2
        assert threads == [threading.get_ident()] * 4

    def test_its_error_is_the_callers(self) -> None:
        def fail(object_id: str) -> str:
            raise ZeroDivisionError(object_id)

        policies = [TokenPolicy.link("confirm", context="required")]
        users = [Subject("auth.user", number) for number in range(300)]
        with SyncTokenManager.from_url("memory://", policies=policies) as manager:
            with pytest.raises(ZeroDivisionError):
                manager.issue(USER, "confirm", context=fail)
            with pytest.raises(ZeroDivisionError):
                list(manager.issue_many(users, "confirm", context=fail))
            assert manager.stats().total == 0


class TestOpenAndClosed:
    def test_a_call_before_opening_and_after_closing(self, backend: Watched) -> None:
        manager = SyncTokenManager(TokenManager(backend))
        for _ in range(2):
            manager.close()
            with pytest.raises(BackendClosed, match="not open"):
                manager.stats()
            with pytest.raises(BackendClosed, match="not open"):
                next(manager.filter_active_tokens(USER))
            with pytest.raises(BackendClosed, match="not open"), manager.redeem(USER, "reset", WRONG):
                pytest.fail("entered")
            manager.open()
            assert manager.stats().total == 0
            manager.close()
        assert backend.calls.count("open") == backend.calls.count("close") == 2

    def test_a_backend_that_does_not_open_leaves_no_thread(self, backend: Watched) -> None:
        backend.failing["open"] = BackendUnavailable("no server")
        manager = SyncTokenManager(TokenManager(backend))
        with pytest.raises(BackendUnavailable):
            manager.open()
        assert portal_threads() == 0
        with pytest.raises(BackendClosed):
            manager.stats()
        backend.failing.clear()
        with manager:
            assert manager.stats().total == 0

    def test_a_backend_that_does_not_close_leaves_no_thread(self, backend: Watched) -> None:
        backend.failing["close"] = BackendUnavailable("no server")
        manager = SyncTokenManager(TokenManager(backend))
        manager.open()
        with pytest.raises(BackendUnavailable):
            manager.close()
        assert portal_threads() == 0

    def test_a_forgotten_one_warns_and_ends(self, backend: Watched) -> None:
        def forget() -> None:
            SyncTokenManager(TokenManager(backend)).open()
            gc.collect()

        with pytest.warns(ResourceWarning, match="not closed"):
            forget()
        assert backend.calls[-1] == "close"
        assert portal_threads() == 0

    def test_a_hook_that_calls_it_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        def hook(_: TokenEvent) -> None:
            called.stats()

        def block_hook(_: TokenEvent) -> None:
            with called.redeem(USER, "reset", WRONG):
                pass

        called = SyncTokenManager(TokenManager(MemoryBackend(), hooks=[hook, block_hook]))
        with called:
            called.deactivate_and_create(USER)
        assert caplog.text.count("it would wait for itself") == 2


def interrupt() -> None:
    """Press Ctrl-C in the main thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def is_starting() -> bool:
    """Say whether the main thread has not come to waiting for its call."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]  # pyright: ignore[reportPrivateUsage]  # documented
    return "start_task_soon" in (summary.name for summary in traceback.extract_stack(frame))


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, as it may not where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.skipif(sys.platform == "win32", reason="a signal reaches no thread that waits for a lock")
class TestInterrupted:
    @pytest.mark.parametrize("moment", ["while it starts", "while it waits"])
    def test_an_interrupted_call_is_cancelled(
        self, manager: SyncTokenManager, backend: Watched, moment: str
    ) -> None:
        outcome: list[str] = []

        async def endless() -> None:
            while moment == "while it waits" and is_starting():
                await anyio.lowlevel.checkpoint()
            interrupt()
            try:
                await anyio.sleep_forever()
            finally:
                outcome.append("cancelled")

        backend.before["present"] = endless
        issued = manager.deactivate_and_create(USER, "reset")
        with pytest.raises(KeyboardInterrupt):
            manager.consume(USER, "reset", issued.key)
        backend.before.clear()
        assert manager.consume(USER, "reset", issued.key) == issued
        manager.close()  # waits for what the cancellation still does
        assert outcome == ["cancelled"]

    def test_an_interrupted_entry_keeps_no_lease(self, manager: SyncTokenManager, backend: Watched) -> None:
        async def endless() -> None:
            del backend.after["present"]
            interrupt()
            await anyio.sleep_forever()

        issued = manager.deactivate_and_create(USER, "reset")
        backend.after["present"] = endless  # the hold was taken, and nobody is told of it
        with pytest.raises(KeyboardInterrupt), manager.redeem(USER, "reset", issued.key):
            pytest.fail("entered")
        manager.close()
        manager.open()
        assert manager.consume(USER, "reset", issued.key) == issued


class TestSecrets:
    def test_no_traceback_shows_a_key(self, manager: SyncTokenManager, backend: Watched) -> None:
        manager.deactivate_and_create(USER, "reset", key_generator_kwargs={"generator": lambda: CANARY})

        def redeem(key: str, **keywords: Any) -> None:
            with manager.redeem(USER, "reset", key, **keywords):
                pytest.fail("entered")

        for name in ("find", "present", "deactivate"):
            backend.failing[name] = BackendUnavailable("no server")
        calls: list[Callable[[], object]] = [
            lambda: manager.consume(USER, "reset", CANARY),
            lambda: manager.verify(USER, "reset", key=CANARY),
            lambda: manager.exists_valid(USER, "reset", CANARY),
            lambda: manager.deactivate(Subject("auth.user"), object(), CANARY),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
            lambda: list(manager.filter_active_tokens(USER, key=CANARY)),
            lambda: redeem(CANARY),
            lambda: redeem(CANARY, lease=timedelta(0)),
        ]
        for call in calls:
            try:
                call()
            except Exception as error:
                shown = traceback.TracebackException.from_exception(error, capture_locals=True)
                frames = [f for f in shown.stack if "/tests/" not in f.filename]
                assert len(frames) > 3
                for frame in frames:
                    assert CANARY not in repr(frame.locals), f"{frame.filename}:{frame.lineno} {frame.name}"
                assert CANARY not in "".join(shown.format_exception_only())
            else:
                pytest.fail("no error")
