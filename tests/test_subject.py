"""The object that a token belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from vtoken import ANY, ConfigurationError, ContentTypes, InvalidInput, Subject


class User:
    def __init__(self, id: object) -> None:  # noqa: A002  # the attribute's name is what is tested
        self.id = id


class Row:
    def __init__(self, pk: object) -> None:
        self.pk = pk


class Proxy(User):
    pass


class Nameless:
    pass


async def load(object_id: str) -> User | None:
    return User(object_id)


class Lazy:
    """A lazy proxy, as Django's SimpleLazyObject and Werkzeug's LocalProxy are."""

    def __init__(self, factory: Callable[[], object]) -> None:
        self._factory = factory

    @property  # type: ignore[misc]  # as those proxies do
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # as those proxies do
        return self._factory().__class__

    def __getattr__(self, name: str) -> object:
        return getattr(self._factory(), name)


def registered() -> ContentTypes:
    types = ContentTypes()
    types.register(User, "auth.user", load=load)
    types.register(Row, "app.row")
    return types


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (User(1), ("auth.user", "1")),
        (User("1"), ("auth.user", "1")),
        (Row(UUID(int=2)), ("app.row", "00000000-0000-0000-0000-000000000002")),
        (Proxy(3), ("auth.user", "3")),
        (User, ("auth.user", None)),
        (Proxy, ("auth.user", None)),
        (Lazy(lambda: User(6)), ("auth.user", "6")),
        (Lazy(lambda: Proxy(7)), ("auth.user", "7")),
        (Lazy(lambda: Subject("auth.user", 8)), ("auth.user", "8")),
        (Subject("auth.user", 4), ("auth.user", "4")),
        (Subject("never.registered", "5"), ("never.registered", "5")),
        (Subject("never.registered"), ("never.registered", None)),
        (Subject("never.registered", ANY), ("never.registered", None)),
    ],
)
def test_from_an_object_to_its_names(obj: object, expected: tuple[str, str | None]) -> None:
    assert registered().resolve(obj) == expected


@pytest.mark.parametrize("bad", [None, True, 1.5, "", "a\0", "\ud800", b"1", [1], {"$ne": 1}, "a" * 513, ANY])
def test_an_object_with_an_id_out_of_range_is_refused_and_never_all(bad: object) -> None:
    with pytest.raises(InvalidInput):
        registered().resolve(User(bad))
    if bad is not ANY:
        with pytest.raises(InvalidInput):
            registered().resolve(Subject("auth.user", bad))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose


@pytest.mark.parametrize("bad", [None, 1, "", "a\0", "\ud800", b"a", ["a"], {"$ne": ""}, "é" * 128, ANY])
def test_a_content_type_out_of_range_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput):
        registered().resolve(Subject(bad, 1))
    with pytest.raises(InvalidInput):
        ContentTypes().register(Nameless, bad)


def test_an_object_that_is_not_saved_yet_says_so() -> None:
    with pytest.raises(InvalidInput, match="save it"):
        registered().resolve(User(None))


def test_a_lazy_proxy_of_an_unregistered_class_names_the_class() -> None:
    with pytest.raises(ConfigurationError, match="Nameless"):
        registered().resolve(Lazy(Nameless))


def test_none_is_no_object() -> None:
    with pytest.raises(InvalidInput):
        registered().resolve(None)


@pytest.mark.parametrize("obj", [Nameless(), Nameless])
def test_an_unregistered_class_says_how_to_register_it(obj: object) -> None:
    with pytest.raises(ConfigurationError) as info:
        registered().resolve(obj)
    for part in ("Nameless", "register(Nameless,", "Subject("):
        assert part in str(info.value)


@pytest.mark.parametrize("obj", ["auth.user:1", 1, ("auth.user", "1"), {"content_type": "auth.user"}])
def test_what_looks_like_a_subject_is_none(obj: object) -> None:
    with pytest.raises(ConfigurationError):
        registered().resolve(obj)


def test_get_id_decides() -> None:
    types = ContentTypes()
    types.register(User, "auth.user", get_id=lambda user: f"u-{user.id}")
    assert types.resolve(User(1)) == ("auth.user", "u-1")


def test_id_goes_before_pk() -> None:
    class Both:
        id = 1
        pk = 2

    types = ContentTypes()
    types.register(Both, "app.both")
    assert types.resolve(Both()) == ("app.both", "1")


def test_a_class_without_id_and_pk_says_what_to_do() -> None:
    types = ContentTypes()
    types.register(Nameless, "app.nameless")
    with pytest.raises(ConfigurationError, match="get_id="):
        types.resolve(Nameless())


def test_a_registered_subclass_goes_before_its_base() -> None:
    types = registered()
    types.register(Proxy, "auth.proxy")
    assert types.resolve(Proxy(1)) == ("auth.proxy", "1")
    assert types.resolve(User(1)) == ("auth.user", "1")


def test_a_class_or_a_name_is_registered_once() -> None:
    types = registered()
    with pytest.raises(ConfigurationError, match="registered already"):
        types.register(User, "auth.other")
    with pytest.raises(ConfigurationError, match="registered already"):
        types.register(Nameless, "auth.user")


@pytest.mark.parametrize("swapped", [(User(1), "auth.user"), ("auth.user", User)])
def test_only_classes_are_registered(swapped: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"takes a class and its name: register\(User, 'auth.user'\)"
    ):
        ContentTypes().register(*swapped)


@pytest.mark.parametrize("loader", [load, User, partial(load)])
async def test_loaders_may_be_async_or_not(loader: Any) -> None:
    types = ContentTypes()
    types.register(User, "auth.user", load=loader)
    user = await types.loader("auth.user")("7")
    assert isinstance(user, User)
    assert user.id == "7"


def test_a_loader_that_is_missing() -> None:
    for name in ("app.row", "never.registered"):
        with pytest.raises(ConfigurationError, match="load="):
            registered().loader(name)


def test_subjects_are_values() -> None:
    assert Subject("a", 1) == Subject("a", 1) != Subject("a", "1")
    assert Subject("a").object_id is ANY
    assert len({Subject("a", 1), Subject("a", 1)}) == 1
    with pytest.raises(FrozenInstanceError):
        Subject("a", 1).object_id = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
