"""Key generators: ours, the policy's, one's own, and those that yield what is taken."""

from __future__ import annotations

import string
from typing import Any

import pytest

from vtoken import (
    ConfigurationError,
    InvalidInput,
    KeyGenerationError,
    Settings,
    Subject,
    TokenPolicy,
)

from .core_tools import (
    MINUTE,
    OTHER,
    USER,
    World,
    refused,
)


class TestGenerateKey:
    async def test_by_default_as_the_settings_say(self, world: World) -> None:
        manager = await world.manager(settings=Settings(default_key_length=40, default_key_chars="abc"))
        key = await manager.generate_key()
        assert (len(key), set(key) <= set("abc")) == (40, True)
        assert len(await manager.generate_key(length=5)) == 5
        assert len(await manager.generate_key(None, 6, "x")) == 6

    @pytest.mark.parametrize("path", ["secrets.token_hex", "secrets:token_hex"])
    async def test_another_generator_with_its_arguments(self, world: World, path: str) -> None:
        manager = await world.manager()
        assert len(await manager.generate_key(path, 4)) == 8
        assert len(await manager.generate_key(path, nbytes=5)) == 10
        assert await manager.generate_key("operator:concat", "x", "y") == "xy"

    async def test_no_stored_token_has_it(self, world: World) -> None:
        manager = await world.manager(settings=Settings(max_key_iterations=7))
        await manager.deactivate_and_create(USER, key_generator_kwargs={"generator": lambda: "taken"})
        drawn: list[str] = []

        def draw(keys: list[str]) -> str:
            drawn.append(keys[min(len(drawn), len(keys) - 1)])
            return drawn[-1]

        assert await manager.generate_key(draw, ["taken", "taken", "free"]) == "free"
        assert len(drawn) == 3
        drawn.clear()
        await refused(KeyGenerationError, manager.generate_key(draw, ["taken"]))
        assert len(drawn) == 7

    @pytest.mark.parametrize("key", ["", None, 5, b"k", "a\0", "\ud800", "a" * 513])
    async def test_what_is_no_key_is_refused(self, world: World, key: Any) -> None:
        await refused(InvalidInput, (await world.manager()).generate_key(lambda: key))

    async def test_the_generators_own_exception_passes(self, world: World) -> None:
        manager = await world.manager()

        def broken() -> str:
            raise ZeroDivisionError

        await refused(ZeroDivisionError, manager.generate_key(broken))
        await refused(ConfigurationError, manager.generate_key("no.such.generator"))


COOLING = TokenPolicy("mail", cooldown=MINUTE)


class TestGenerators:
    async def test_arguments_for_the_default_generator(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(
            USER, key_generator_kwargs={"length": 8, "allowed_chars": "ABC"}
        )
        assert (len(token.key), set(token.key) <= set("ABC")) == (8, True)
        token = await manager.deactivate_and_create(USER, key_generator_kwargs={"length": 9})
        assert len(token.key) == 9
        assert len((await manager.deactivate_and_create(USER, key_generator_kwargs={})).key) == 32

    async def test_what_is_left_out_is_the_policys_or_the_settings(self, world: World) -> None:
        manager = await world.manager(
            TokenPolicy("own", key_length=90),
            settings=Settings(default_key_length=40, default_key_chars=string.ascii_lowercase),
        )
        for slug, length in (("own", 90), ("other", 40)):
            kwargs = {"allowed_chars": string.ascii_uppercase}
            key = (await manager.deactivate_and_create(USER, slug, key_generator_kwargs=kwargs)).key
            assert (len(key), key.isupper()) == (length, True)
            key = (await manager.deactivate_and_create(USER, slug, key_generator_kwargs={"length": 60})).key
            assert (len(key), key.islower()) == (60, True)

    @pytest.mark.parametrize(
        "kwargs", [{"length": 1}, {"allowed_chars": "aab"}, {"allowed_chars": "a/?"}, {"length": 90, "x": 1}]
    )
    async def test_a_calls_arguments_are_held_to_the_policys_floors(
        self, world: World, kwargs: dict[str, Any]
    ) -> None:
        manager = await world.manager(TokenPolicy.link("own"))
        await refused(InvalidInput, manager.issue(USER, "own", key_generator_kwargs=kwargs))
        assert await world.stored() == []

    @pytest.mark.parametrize("generator", [f"{__name__}.spelt", f"{__name__}:spelt"])
    async def test_a_generator_of_its_own_with_its_arguments(self, world: World, generator: str) -> None:
        manager = await world.manager()
        kwargs = {"generator": generator, "text": "abc", "times": 2}
        assert (await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)).key == "abcabc"
        assert kwargs == {"generator": generator, "text": "abc", "times": 2}

    @pytest.mark.parametrize("generator", ["no.such.generator", "vtoken:ANY", 5])
    async def test_one_that_cannot_be_called(self, world: World, generator: Any) -> None:
        manager = await world.manager()
        await refused(
            ConfigurationError,
            manager.deactivate_and_create(USER, key_generator_kwargs={"generator": generator}),
        )

    @pytest.mark.parametrize("iterations", [1, 2, 100])
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_only_taken_keys(self, world: World, method: str, iterations: int) -> None:
        draws: list[int] = []

        def taken() -> str:
            draws.append(1)
            return "taken"

        manager = await world.manager(COOLING, settings=Settings(max_key_iterations=iterations))
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        old = await manager.deactivate_and_create(USER, "mail", expiration_in_minutes=1)
        world.clock.advance(2 * MINUTE)
        before = await world.stored()
        with pytest.raises(KeyGenerationError):
            await getattr(manager, method)(USER, "mail", key_generator_kwargs={"generator": taken})
        assert len(draws) == iterations
        assert await world.stored() == before
        assert await manager.deactivate_and_create(USER, "mail") != old  # and no cooldown was spent

    async def test_one_free_key_at_the_last_draw(self, world: World) -> None:
        keys = iter(["taken"] * 99 + ["free"])
        manager = await world.manager()
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        token = await manager.deactivate_and_create(
            USER, key_generator_kwargs={"generator": lambda: next(keys)}
        )
        assert token.key == "free"

    async def test_keys_are_unique_over_the_store_and_codes_within_their_scope(self, world: World) -> None:
        code = TokenPolicy.code("login", key_generator=lambda: "123456")
        pin = TokenPolicy.code("pin", key_generator=lambda: "123456")
        manager = await world.manager(
            code, pin, settings=Settings(secret="0123456789" * 4, max_key_iterations=1)
        )
        link = {"generator": lambda: "link"}
        await manager.issue(USER, key_generator_kwargs=link)
        for obj, slug in ((USER, None), (OTHER, None), (USER, "b"), (Subject("app.row", 42), None)):
            await refused(KeyGenerationError, manager.issue(obj, slug, key_generator_kwargs=link))
        subjects = ((USER, "login"), (OTHER, "login"), (USER, "pin"), (Subject("app.row", 42), "login"))
        tokens = [await manager.issue(obj, slug) for obj, slug in subjects]
        assert {token.key for token in tokens} == {"123456"}
        # Beside the token that has the code there is no room; in its place there is.
        await refused(KeyGenerationError, manager.issue(USER, "login", replace=False))
        await manager.issue(USER, "login")
        assert len({key.digest for stored in await world.stored() for key in stored.keys}) == 5

    async def test_a_used_key_is_taken_until_it_is_purged(self, world: World) -> None:
        manager = await world.manager(settings=Settings(max_key_iterations=1))
        kwargs = {"generator": lambda: "again"}
        await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)
        await manager.consume(USER, None, "again")
        await refused(KeyGenerationError, manager.deactivate_and_create(USER, key_generator_kwargs=kwargs))
        await manager.purge()
        assert (await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)).key == "again"

    @pytest.mark.parametrize("draw", [1, 2])
    async def test_its_own_exception_passes_as_it_is_and_the_old_token_stays(
        self, world: World, draw: int
    ) -> None:
        error = ZeroDivisionError("the generator's own")
        draws: list[int] = []

        def broken() -> str:
            draws.append(1)
            if len(draws) == draw:
                raise error
            return "taken"

        manager = await world.manager(COOLING)
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        old = await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(MINUTE)
        raised = await refused(
            ZeroDivisionError,
            manager.deactivate_and_create(USER, "mail", key_generator_kwargs={"generator": broken}),
        )
        assert raised is error
        assert (raised.__cause__, raised.__context__) == (None, None)
        assert await manager.verify(USER, "mail", old.key) == old
        await manager.deactivate_and_create(USER, "mail")  # no cooldown was spent

    @pytest.mark.parametrize("key", ["", None, 5, b"key", "a\0", "\ud800", "a" * 513, ["a"]])
    async def test_what_is_no_key_is_refused(self, world: World, key: Any) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER)
        await refused(
            InvalidInput, manager.deactivate_and_create(USER, key_generator_kwargs={"generator": lambda: key})
        )
        assert await manager.verify(USER, None, old.key) == old


def spelt(text: str, times: int) -> str:
    return text * times
