"""The Django app that vtoken grew out of, as an asyncio application would call it: through ``sync_to_async``.

It keeps keys readable. Each of our operations is one transaction around its manager's own methods, because
the app itself opens none. Same journal and synchronous setting as everybody here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from .contender import SLUG, Op, Row, Run, by_tasks

# Typed as Any: neither the app nor Django has types, and neither need be installed.
_django: Any = import_module("django")
_sync_to_async: Any = import_module("asgiref.sync").sync_to_async
_settings: Any = import_module("django.conf").settings

if not _settings.configured:
    _settings.configure(
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "verification_token"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": ":memory:",
                "OPTIONS": {
                    "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL",
                    "transaction_mode": "IMMEDIATE",
                    "timeout": 30,
                },
                "CONN_MAX_AGE": None,
            }
        },
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=True,
    )
    _django.setup()

# Models can be imported only now.
_database: Any = import_module("django.db")
_user: Any = import_module("django.contrib.auth.models").User
_content_type: Any = import_module("django.contrib.contenttypes.models").ContentType
_token: Any = import_module("verification_token.models").VerificationToken


class Contender:
    """Django's own rule: all of its synchronous code in one thread, one call after the other."""

    name = "Django base app"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokens.db"

    async def open(self) -> None:
        await _sync_to_async(self._open)()

    async def close(self) -> None:
        await _sync_to_async(self._close)()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        return list(await _sync_to_async(self._fill)(object_ids))

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        query = "SELECT object_id, key, is_active FROM verification_token_verificationtoken"
        with closing(sqlite3.connect(self._path)) as database:
            found = database.execute(query).fetchall()
        return [Row(object_id, key.encode(), bool(active)) for object_id, key, active in found]

    async def issue(self, object_id: str) -> str:
        return str(await _sync_to_async(_issue)(object_id))

    async def check(self, object_id: str, key: str) -> bool:
        return bool(await _sync_to_async(_check)(object_id, key))

    async def consume(self, object_id: str, key: str) -> bool:
        return bool(await _sync_to_async(_consume)(object_id, key))

    def _open(self) -> None:
        connection = _database.connection
        connection.close()
        _database.connections.settings["default"]["NAME"] = connection.settings_dict["NAME"] = str(self._path)
        _content_type.objects.clear_cache()
        with connection.schema_editor() as editor:
            editor.create_model(_content_type)
            editor.create_model(_token)
        _content_type.objects.get_for_model(_user)

    def _close(self) -> None:
        _database.connection.close()

    def _fill(self, object_ids: Sequence[str]) -> list[str]:
        with _database.transaction.atomic():
            return [
                _token.objects.deactivate_and_create(_user(pk=object_id), SLUG).key
                for object_id in object_ids
            ]


def _issue(object_id: str) -> str:
    with _database.transaction.atomic():
        return str(_token.objects.deactivate_and_create(_user(pk=object_id), SLUG).key)


def _check(object_id: str, key: str) -> bool:
    return bool(_token.objects.exists_valid(_user(pk=object_id), key, SLUG))


def _consume(object_id: str, key: str) -> bool:
    """The app has no such method: look, and if the token is valid, deactivate it."""
    user = _user(pk=object_id)
    with _database.transaction.atomic():
        if not _token.objects.exists_valid(user, key, SLUG):
            return False
        _token.objects.deactivate(user, SLUG, key)
    return True
