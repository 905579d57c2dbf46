"""Codes as people type them, and the checksum that tells a typing error."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from vtoken import (
    InvalidInput,
    Settings,
    Subject,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken.backend import Match, StoredToken
from vtoken.keys import add_checksum

from .core_tools import (
    CODE,
    USER,
    WRONG,
    Watched,
    World,
    reason,
    redeem,
    refused,
)


class TestCodes:
    @pytest.mark.parametrize("spelling", ["{0}{1}", "{0} {1}", "{0}-{1}", " {0}{1}\n", "{0}\u00a0{1}"])
    async def test_as_people_type_them(self, world: World, spelling: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        typed = spelling.format(issued.key[:3], issued.key[3:])
        assert await manager.consume(USER, "login", typed) == issued

    @pytest.mark.parametrize("zero", ["０", "٠", "۰", "०"])
    async def test_ascii_digits_only(self, world: World, zero: str) -> None:
        manager = await world.manager(CODE)
        key = (await manager.deactivate_and_create(USER, "login")).key
        typed = "".join(chr(ord(zero) + int(digit)) for digit in key)
        assert await reason(manager.consume(USER, "login", typed)) == "unknown"

    async def test_letters_of_one_case(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", key_chars="ABCDEFGHJKLMNPQRSTUVWXYZ23456789"))
        issued = await manager.deactivate_and_create(USER, "login")
        assert await manager.verify(USER, "login", issued.key.lower()) == issued

    async def test_a_code_never_passes_as_a_link_nor_a_link_as_a_code(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy.code("pin"))
        link = await manager.deactivate_and_create(
            USER, "reset", key_generator_kwargs={"generator": lambda: "123456"}
        )
        code = await manager.deactivate_and_create(
            USER, "login", key_generator_kwargs={"generator": lambda: "654321"}
        )
        for slug, key in (("login", link.key), ("pin", link.key), ("reset", code.key), ("pin", code.key)):
            assert await reason(manager.verify(USER, slug, key)) == "unknown"

    async def test_a_thousand_people_may_hold_the_same_code(self, world: World) -> None:
        manager = await world.manager(CODE)
        kwargs = {"generator": lambda: "123456"}
        for n in range(1000):
            await manager.deactivate_and_create(Subject("auth.user", n), "login", key_generator_kwargs=kwargs)
        assert len({row.digest for row in await world.stored()}) == 1000
        assert (await manager.consume(Subject("auth.user", 500), "login", "123456")).object_id == "500"
        assert await reason(manager.verify(Subject("auth.user", 500), "login", "123456")) == "used"
        assert await manager.exists_valid(Subject("auth.user", 501), "login", "123456")

    async def test_a_store_that_answers_too_much_is_not_believed(self, world: World) -> None:
        # As one would whose index ignores case, say: the digests are compared again, in constant time.
        class Lax(Watched):
            async def find(
                self, match: Match, limit: int, after: tuple[int, str] | None = None
            ) -> list[StoredToken]:
                return await super().find(match._replace(digests=None), limit, after)

        manager = await world.manager(CODE, backend=Lax(world.backend.inner))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await reason(manager.verify(USER, "reset", WRONG)) == "unknown"
        assert await manager.verify(USER, "reset", issued.key) == issued

    async def test_rows_name_their_scheme_and_secret(self, world: World) -> None:
        manager, without = await world.manager(CODE), await world.manager(settings=Settings())
        await without.deactivate_and_create(USER, "bare")
        await manager.deactivate_and_create(USER, "reset")
        await manager.deactivate_and_create(USER, "login")
        rows = {row.slug: row for row in await world.stored()}
        assert {slug: row.scheme for slug, row in rows.items()} == {
            "bare": "sha256",
            "reset": "hmac-sha256",
            "login": "code-hmac-sha256",
        }
        assert rows["bare"].secret_id == ""
        assert rows["reset"].secret_id == rows["login"].secret_id != ""

    async def test_without_a_secret_a_link_is_its_sha256(self, world: World) -> None:
        issued = await (await world.manager(settings=Settings())).deactivate_and_create(USER)
        assert (await world.stored())[0].digest == hashlib.sha256(issued.key.encode()).digest()


class TestTypingErrors:
    async def test_refused_without_the_store_and_without_an_attempt(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert issued.key.startswith("vt_")
        assert len(issued.key) == 3 + 32 + 6
        world.backend.calls.clear()
        mistyped = issued.key[:10] + ("x" if issued.key[10] != "x" else "y") + issued.key[11:]
        for key in (
            mistyped,
            issued.key[3:],
            issued.key[:-1],
            issued.key + "0",
            issued.key.swapcase(),
            "",
            "vt_",
        ):
            for call in (manager.verify, manager.consume):
                assert await reason(call(USER, "reset", key)) == "unknown"
            assert await reason(redeem(manager, "reset", key)) == "unknown"
            assert not await manager.exists_valid(USER, "reset", key)
        assert world.backend.calls == []
        assert await manager.consume(USER, "reset", issued.key) == issued

    async def test_a_well_formed_wrong_key_is_an_attempt(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await reason(manager.verify(USER, "reset", add_checksum("vt_", "x" * 32))) == "unknown"
        await refused(TooManyAttempts, manager.verify(USER, "reset", issued.key))

    async def test_deactivating_by_a_mistyped_key(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_"))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await manager.deactivate(USER, "reset", issued.key[:-1]) == 0
        assert await manager.deactivate(USER, key=issued.key[:-1]) == 0
        assert [t async for t in manager.filter_active_tokens(USER, key=issued.key)] == [issued]
        assert await manager.deactivate(USER, "reset", issued.key) == 1

    async def test_a_generator_of_its_own_is_framed_too(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_"))
        kwargs: dict[str, Any] = {"generator": lambda: "k" * 503}
        issued = await manager.deactivate_and_create(USER, "reset", key_generator_kwargs=kwargs)
        assert len(issued.key) == 512
        assert await manager.consume(USER, "reset", issued.key) == issued
        kwargs = {"generator": lambda: "k" * 504}
        await refused(InvalidInput, manager.deactivate_and_create(USER, "reset", key_generator_kwargs=kwargs))
