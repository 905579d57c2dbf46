"""Codes as people type them, and the checksum that tells a typing error."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    ConfigurationError,
    InvalidInput,
    Settings,
    Subject,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken.backend import Hold, Match, Outcome, Presented, Spend, Use
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


def fixed(slug: str, code: str) -> TokenPolicy:
    """A policy whose generator always draws the same code."""
    return TokenPolicy.code(slug, key_generator=lambda: code)


class TestCodes:
    @pytest.mark.parametrize(
        "spelling",
        [
            "{0}{1}",
            "{0} {1}",
            "{0}-{1}",
            " {0}{1}\n",
            "{0}\u00a0{1}",
            "\ufeff{0}{1}\u200b",
            "{0}\u2013{1}",
            "{0}\u2011{1}",
            "{0}.{1}",
            "{0}_{1}",
            "{0}\t{1}\r\n",
        ],
    )
    async def test_as_people_type_them(self, world: World, spelling: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        typed = spelling.format(issued.key[:3], issued.key[3:])
        assert await manager.consume(USER, "login", typed) == issued

    @pytest.mark.parametrize("zero", ["０", "٠", "۰", "०", "𝟎"])
    async def test_digits_of_any_script(self, world: World, zero: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        typed = "".join(chr(ord(zero) + int(digit)) for digit in issued.key)
        assert await manager.consume(USER, "login", typed) == issued

    async def test_letters_of_one_case(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", key_chars="ABCDEFGHJKLMNPQRSTUVWXYZ23456789"))
        issued = await manager.deactivate_and_create(USER, "login")
        assert await manager.verify(USER, "login", issued.key.lower()) == issued

    async def test_what_looks_alike(self, world: World) -> None:
        manager = await world.manager(
            TokenPolicy.code("login", key_chars="ABCDEFGHJKMNPQRSTUVWXYZ0123456789")
        )
        issued = await manager.issue(USER, "login")
        typed = issued.key.replace("0", "o").replace("1", "l")
        assert await manager.verify(USER, "login", typed) == issued

    async def test_a_code_never_passes_as_a_link_nor_a_link_as_a_code(self, world: World) -> None:
        manager = await world.manager(fixed("login", "654321"), fixed("pin", "123123"))
        await manager.issue(USER, "reset", key_generator_kwargs={"generator": lambda: "123456"})
        await manager.issue(USER, "login")
        await manager.issue(USER, "pin")
        for slug, key in (("login", "123456"), ("pin", "123456"), ("reset", "654321"), ("pin", "654321")):
            assert await reason(manager.verify(USER, slug, key)) == "unknown"

    async def test_a_thousand_people_may_hold_the_same_code(self, world: World) -> None:
        manager = await world.manager(fixed("login", "123456"))
        for n in range(1000):
            await manager.issue(Subject("auth.user", n), "login")
        assert len({key.digest for row in await world.stored() for key in row.keys}) == 1000
        assert (await manager.consume(Subject("auth.user", 500), "login", "123456")).object_id == "500"
        assert await reason(manager.verify(Subject("auth.user", 500), "login", "123456")) == "used"
        assert await manager.exists_valid(Subject("auth.user", 501), "login", "123456")

    async def test_a_fixed_code_can_be_issued_again_and_again(self, world: World) -> None:
        manager = await world.manager(fixed("login", "123456"))
        for end in ("used", "replaced", "deactivated", "used"):
            token = await manager.issue(USER, "login")
            assert token.key == "123456"
            assert await manager.verify(USER, "login", "123456") == token
            if end == "used":
                assert await manager.consume(USER, "login", "123456") == token
            elif end == "deactivated":
                await manager.deactivate(USER)

    async def test_a_generator_whose_code_is_all_separators(self, world: World) -> None:
        manager = await world.manager(fixed("login", " -- "))
        await refused(ConfigurationError, manager.issue(USER, "login"))
        assert await reason(manager.verify(USER, "login", "--")) == "unknown"

    async def test_a_call_changes_neither_length_nor_alphabet_nor_lifetime(self, world: World) -> None:
        manager = await world.manager(CODE)
        for kwargs in ({"length": 1}, {"allowed_chars": "1"}, {"generator": lambda: "123456"}):
            await refused(InvalidInput, manager.issue(USER, "login", key_generator_kwargs=kwargs))
        for life in (None, "11m", 11, timedelta(days=1)):
            await refused(InvalidInput, manager.issue(USER, "login", expires_in=life))
        assert await world.stored() == []

    async def test_a_store_that_answers_too_much_is_not_believed(self, world: World) -> None:
        class Lax(Watched):
            """Takes any key, as a store would that somebody can write to."""

            async def present(
                self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
            ) -> Presented:
                found = await self.inner.find(key._replace(digests=None, kind=None), 1)
                return Presented(Outcome.RIGHT, found[0] if found else None)

        manager = await world.manager(CODE, backend=Lax(world.backend.inner))
        issued = await manager.deactivate_and_create(USER, "reset")
        for call in (manager.verify, manager.consume):
            assert await reason(call(USER, "reset", WRONG)) == "unknown"
        assert await reason(redeem(manager, "reset", WRONG)) == "unknown"
        assert not await manager.exists_valid(USER, "reset", WRONG)
        assert await manager.verify(USER, "reset", issued.key) == issued

    async def test_rows_name_their_scheme_and_secret(self, world: World) -> None:
        manager, without = await world.manager(CODE), await world.manager(settings=Settings())
        await without.deactivate_and_create(USER, "bare")
        await manager.deactivate_and_create(USER, "reset")
        await manager.deactivate_and_create(USER, "login")
        rows = {row.slug: row.keys[0] for row in await world.stored()}
        assert {slug: row.scheme for slug, row in rows.items()} == {
            "bare": "sha256",
            "reset": "hmac-sha256",
            "login": "code-hmac-sha256",
        }
        assert rows["bare"].secret_id == ""
        assert rows["reset"].secret_id == rows["login"].secret_id != ""

    async def test_without_a_secret_a_link_is_its_sha256(self, world: World) -> None:
        issued = await (await world.manager(settings=Settings())).deactivate_and_create(USER)
        [key] = (await world.stored())[0].keys
        assert key.digest == hashlib.sha256(issued.key.encode()).digest()


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
            issued.key[:-1],
            issued.key + "0",
            "",
            "vt_",
        ):
            for call in (manager.verify, manager.consume):
                assert await reason(call(USER, "reset", key)) == "unknown"
            assert await reason(redeem(manager, "reset", key)) == "unknown"
            assert not await manager.exists_valid(USER, "reset", key)
        assert world.backend.calls == []
        assert await manager.consume(USER, "reset", issued.key) == issued

    async def test_a_prefix_that_is_new_or_another_is_asked_of_the_store(self, world: World) -> None:
        before = await world.manager(TokenPolicy("reset"))
        issued = await before.issue(USER, "reset")
        for prefix in ("vt_", "new_"):
            manager = await world.manager(TokenPolicy("reset", prefix=prefix))
            assert await manager.verify(USER, "reset", issued.key) == issued
        assert await manager.consume(USER, "reset", f"\ufeff {issued.key}\n") == issued

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


class TestTestCodes:
    def policy(self, **fields: Any) -> TokenPolicy:
        return TokenPolicy.code(
            "login", test_codes={USER: "123456"}, test_codes_why="app-store review", **fields
        )

    async def test_they_are_issued_again_in_every_context(self, world: World) -> None:
        manager = await world.manager(self.policy(context="required"))
        for context in ("phone", "tablet", "phone"):
            issued = await manager.issue(USER, "login", context=context)
            assert issued.key == "123456"
            found = await manager.get_active_or_create(USER, "login", context=context)
            assert found == issued
        await manager.consume(USER, "login", "123456", context="phone")

    async def test_they_are_issued_again_beside_the_first(self, world: World) -> None:
        manager = await world.manager(self.policy())
        await manager.issue(USER, "login")
        issued = await manager.issue(USER, "login", replace=False)
        assert await manager.consume(USER, "login", "123456") == issued
        assert not await manager.exists_valid(USER, "login")
