"""A backend that was refused: what it raises, its repr, its end, and what its traceback shows."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable
from types import FrameType

import pytest

from vtoken import ConfigurationError
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.client import Client
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.sqlite import SQLiteBackend

PASSWORD = "canary"
URL = f"mongodb://someone:{PASSWORD}@127.0.0.1:1/db"

POSTGRESQL = f"postgresql://someone:{PASSWORD}@127.0.0.1:1/db"

REFUSED: dict[str, Callable[[], object]] = {
    "sqlite, no path": lambda: SQLiteBackend(5),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "sqlite, no file": lambda: SQLiteBackend(""),
    "sqlite, an option": lambda: SQLiteBackend("x", check="f"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "sqlite, no URL": lambda: SQLiteBackend.from_url(5),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "mongodb, nothing": lambda: MongoDBBackend(),
    "mongodb, no client": lambda: MongoDBBackend(3),
    "mongodb, a number": lambda: MongoDBBackend(url=5),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "mongodb, bytes": lambda: MongoDBBackend(url=URL.encode()),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "mongodb, a port": lambda: MongoDBBackend(url=URL.replace(":1/", ":99999/")),
    "mongodb, a parameter": lambda: MongoDBBackend(url=f"{URL}?foo=1"),
    "mongodb, a database": lambda: MongoDBBackend(url=URL, database="a/b"),
    "mongodb, a driver": lambda: MongoDBBackend(url=URL, driver="none"),
    "mongodb, durable": lambda: MongoDBBackend(url=URL, durable=1),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "mongodb, no URL": lambda: MongoDBBackend.from_url(5),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "mongodb, an option": lambda: MongoDBBackend.from_url(URL, colection="x"),
    "postgresql, no URL": lambda: PostgreSQLBackend.from_url(5),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    "postgresql, a parameter": lambda: PostgreSQLBackend.from_url(f"{POSTGRESQL}?foo=1"),
    "postgresql, an option": lambda: PostgreSQLBackend.from_url(POSTGRESQL, shema="x"),
    "postgresql, a size": lambda: PostgreSQLBackend.from_url(f"{POSTGRESQL}?pool_size={PASSWORD}"),
    "mongodb, a bad URL": lambda: MongoDBBackend.from_url(f"{URL}?foo=1"),
}


def frames(error: BaseException) -> list[FrameType]:
    """The frames of an error, and of what it was raised from or beside, but for this file's own."""
    found: list[FrameType] = []
    here: BaseException | None = error
    while here is not None:
        found += [frame for frame, _ in traceback.walk_tb(here.__traceback__)]
        here = here.__cause__ or here.__context__
    return [frame for frame in found if frame.f_code.co_filename != __file__]


def shown(frame: FrameType) -> str:
    return str({name: repr(value) for name, value in dict(frame.f_locals).items()})


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_a_configuration_error_that_shows_no_password(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError) as info:
        make()
    assert PASSWORD not in str(info.value)
    for frame in frames(info.value):
        assert PASSWORD not in shown(frame), frame.f_code.co_qualname


@pytest.mark.parametrize("make", [SQLiteBackend, MongoDBBackend, Client, PostgreSQLBackend])
def test_one_that_was_never_made_has_a_repr_and_an_end(make: type[object]) -> None:
    half = object.__new__(make)
    assert "(not made)" in repr(half)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del half
        gc.collect()
    assert said == []


@pytest.mark.parametrize("driver", ["pymongo", "motor"])
@pytest.mark.parametrize("parameter", ["tlsCAFile=/no/such/file", "tlsCertificateKeyFile=/no/such/file"])
async def test_an_open_that_fails_in_the_driver_shows_no_password(driver: str, parameter: str) -> None:
    backend = MongoDBBackend(url=f"{URL}?{parameter}", driver=driver)
    with pytest.raises(ConfigurationError, match="a file that it names cannot be read") as info:
        await backend.open()
    for frame in frames(info.value):
        assert PASSWORD not in shown(frame), frame.f_code.co_qualname
