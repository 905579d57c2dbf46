"""Messages: to an SMTP server, or to a mailbox file, where a developer can read them."""

from __future__ import annotations

import mailbox
import smtplib
import ssl
from collections.abc import Callable
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

Deliver = Callable[[EmailMessage], None]
"""Delivers a message; it may block."""

_SECONDS = 10


def deliverer(smtp: str | None, file: Path) -> Deliver:
    """How messages are delivered.

    Args:
        smtp: the server's URL; None, to the file.
        file: a mailbox in the format mbox.
    """
    return partial(_to_file, file) if smtp is None else partial(_by_smtp, smtp)


def _to_file(file: Path, message: EmailMessage) -> None:
    box = mailbox.mbox(file)
    box.lock()
    try:
        box.add(message)
        box.flush()
    finally:
        box.close()  # unlocks it, too


def _by_smtp(url: str, message: EmailMessage) -> None:
    server = urlsplit(url)
    host = server.hostname or "localhost"
    context = ssl.create_default_context()
    if server.scheme == "smtps":
        connection: smtplib.SMTP = smtplib.SMTP_SSL(
            host, server.port or 465, timeout=_SECONDS, context=context
        )
    else:
        connection = smtplib.SMTP(host, server.port or 25, timeout=_SECONDS)
    with connection:
        connection.ehlo()
        if server.scheme == "smtp" and connection.has_extn("starttls"):
            connection.starttls(context=context)
        elif server.scheme == "smtp" and server.username is not None:
            raise smtplib.SMTPNotSupportedError("the server offers no TLS: it is not told the password")
        if server.username is not None:
            connection.login(unquote(server.username), unquote(server.password or ""))
        connection.send_message(message)
