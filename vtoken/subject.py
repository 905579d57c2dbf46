"""The object that a token belongs to: from an application's object to (content type, object id), and back."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from uuid import UUID

from vtoken.backend import PRETENDED
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import ANY, MAX_NAME_BYTES, Wildcard, check_object_id, check_text

T = TypeVar("T")
Loader = Callable[[str], Awaitable[object | None]]
AnyLoader = Callable[[str], Awaitable[object | None] | object | None]
"""A loader as an application registers it, async or not."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that a token belongs to, named without the object itself.

    Args:
        content_type: what kind of object, 1 to 255 bytes of UTF-8, e.g. ``"auth.user"``.
        object_id: which one, a ``str``, ``int`` or ``UUID`` of 1 to 512 bytes as text. Left out, any
            object of that content type: for a link that carries nothing but its key.

    What is out of range is refused by the manager's methods, as :class:`~vtoken.InvalidInput`.
    """

    content_type: str
    object_id: str | int | UUID | Wildcard = ANY


@dataclass(frozen=True, slots=True)
class _ContentType:
    name: str
    get_id: Callable[[Any], object]
    load: AnyLoader | None


class ContentTypes:
    """Which classes of the application tokens may belong to."""

    def __init__(self) -> None:
        self._by_class: dict[type, _ContentType] = {}
        self._by_name: dict[str, _ContentType] = {}

    def register(
        self,
        cls: type[T],
        name: str,
        get_id: Callable[[T], object] | None = None,
        load: AnyLoader | None = None,
    ) -> None:
        """Let tokens belong to the instances of a class and of its subclasses.

        Args:
            cls: the class.
            name: its content type in the store, 1 to 255 bytes; keep it when the class is renamed.
            get_id: from an instance to its id; left out, the attribute ``id`` or else ``pk``.
            load: a callable, async or not, from an ``object_id`` (always a ``str``) to the object, or
                to None where it is gone. :meth:`TokenManager.content_object` calls it. One that waits
                without being async blocks the event loop: use it with ``SyncTokenManager`` only.

        Raises:
            InvalidInput: ``name`` is out of range.
            ConfigurationError: the class or the name is taken.
        """
        if not isinstance(cls, type):
            raise ConfigurationError("register() takes a class and its name: register(User, 'auth.user')")
        _checked_name(name)
        if cls in self._by_class or name in self._by_name:
            raise ConfigurationError(f"{cls.__qualname__} or the content type {name!r} is registered already")
        content_type = _ContentType(name, get_id or _default_id(cls), load)
        self._by_class[cls] = self._by_name[name] = content_type

    def resolve(self, obj: object) -> tuple[str, str | None]:
        """Return the checked content type and the object id, None standing for any object.

        Raises:
            InvalidInput: the id is None or out of range.
            ConfigurationError: the class is not registered.
        """
        if isinstance(obj, Subject):
            name = obj.content_type
            content_type = _known_name(name) if type(name) is str else _checked_name(name)
            return content_type, None if obj.object_id is ANY else check_object_id(obj.object_id)
        if isinstance(obj, type):
            return self._of_class(obj).name, None
        if obj is None:
            raise InvalidInput("the object of a token must not be None")
        # A lazy proxy (Django's SimpleLazyObject, Werkzeug's LocalProxy) has its object's __class__.
        cls = type(obj) if self._find(type(obj)) else obj.__class__
        content_type_of = self._of_class(cls)
        return content_type_of.name, check_object_id(content_type_of.get_id(obj))

    def loader(self, content_type: str) -> Loader:
        """Return the registered loader of a content type, as an async callable.

        Raises:
            ConfigurationError: there is none.
        """
        load = self.registered_loader(content_type)

        async def load_object(object_id: str) -> object | None:
            found = load(object_id)
            return await found if inspect.isawaitable(found) else found

        return load_object

    def registered_loader(self, content_type: str) -> AnyLoader:
        """Return the loader of a content type as it was registered, async or not.

        Raises:
            ConfigurationError: there is none.
        """
        registered = self._by_name.get(content_type)
        if registered is None or registered.load is None:
            raise ConfigurationError(
                f"no loader for the content type {content_type!r}:"
                f" register(Class, {content_type!r}, load=...),"
                " where load is a callable from an object id to the object"
            )
        return registered.load

    def _find(self, cls: type) -> _ContentType | None:
        for base in cls.__mro__:  # an ORM's proxy classes are subclasses of the registered one
            if base in self._by_class:
                return self._by_class[base]
        return None

    def _of_class(self, cls: type) -> _ContentType:
        found = self._find(cls)
        if found is not None:
            return found
        name = cls.__qualname__
        raise ConfigurationError(
            f"{name} is not a registered content type: call content_types.register({name}, {name.lower()!r}),"
            " or pass a Subject(content_type, object_id)"
        )


def _checked_name(content_type: object) -> str:
    """Return a content type that an application may use."""
    name = check_text("content_type", content_type, MAX_NAME_BYTES)
    if name == PRETENDED:
        raise InvalidInput(f"the content type {PRETENDED!r} is reserved")
    return name


_known_name = lru_cache(1024)(_checked_name)
"""The same for a ``str``, of which there are few."""


def _default_id(cls: type) -> Callable[[Any], object]:
    def get_id(obj: object) -> object:
        for name in ("id", "pk"):
            if hasattr(obj, name):
                return getattr(obj, name)
        raise ConfigurationError(
            f"{cls.__qualname__} has no attribute id or pk: register it with get_id=lambda obj: ..."
        )

    return get_id
