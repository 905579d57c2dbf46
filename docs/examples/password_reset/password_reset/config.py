"""What the environment says.

``VTOKEN_URL``, ``VTOKEN_SECRET``
    the store and the secret, as for any application of vtoken. The accounts are kept in the same database, on
    SQLite with ``?shared=true``. Left out: an SQLite file, and a secret that is made at the first start, both
    in ``APP_DATA``.
``APP_BASE_URL``
    how this site is reached; links are built from it and never from a request. Default ``http://127.0.0.1:8000``.
``APP_DATA``
    a directory for the mailbox and what else is left out here. Default ``data``.
``APP_SMTP``
    ``smtp://[user:password@]host[:port]``, which uses TLS where the server offers it, or ``smtps://``. Left
    out, messages go to the file ``mailbox`` in ``APP_DATA``.
``APP_SENDER``
    the address that messages come from.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vtoken import Configuration, Settings


@dataclass(frozen=True)
class Config:
    """What the application needs to know; see the module."""

    data: Path
    tokens_url: str = field(repr=False)
    settings: Settings
    base_url: str = "http://127.0.0.1:8000"
    smtp: str | None = field(default=None, repr=False)
    sender: str = "no-reply@example.org"

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read the environment, and make the data directory and the secret where there are none."""
        data = Path(environ.get("APP_DATA", "data")).resolve()
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data / ".gitignore").write_text("*\n", encoding="ascii")  # it may lie in a repository
        found = Configuration.from_env(environ, default_url=f"sqlite:///{data.as_posix()}/app.db?shared=true")
        settings = found.settings
        if settings.secret is None:  # codes need one
            settings = replace(settings, secret=_kept_secret(data / "secret"))
        return cls(
            data=data,
            tokens_url=found.url,
            settings=settings,
            base_url=environ.get("APP_BASE_URL", cls.base_url).rstrip("/"),
            smtp=environ.get("APP_SMTP"),
            sender=environ.get("APP_SENDER", cls.sender),
        )

    @property
    def secret(self) -> str:
        """The secret, which there always is."""
        if self.settings.secret is None:
            raise ValueError("the application needs a secret")
        return self.settings.secret

    @property
    def is_https(self) -> bool:
        """Whether cookies can be kept to encrypted connections."""
        return self.base_url.startswith("https://")


def _kept_secret(file: Path) -> str:
    """The secret of earlier starts, or a new one.

    Beside the store it protects nothing if both are stolen: on a server put it into the environment.
    """
    if not file.exists():
        new = file.with_name(f"secret.{secrets.token_hex(8)}")
        with open(new, "x", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)) as made:
            made.write(secrets.token_urlsafe(32))
        try:
            os.link(new, file)  # of several that start at once, one makes it
        except FileExistsError:
            pass
        finally:
            new.unlink()
    return file.read_text(encoding="ascii")
