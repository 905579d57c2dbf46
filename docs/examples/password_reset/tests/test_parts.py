"""The parts that no browser sees: messages, passwords, configuration, and the command that starts it all."""

from __future__ import annotations

import mailbox
import os
import signal
import socket
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from email.message import EmailMessage
from pathlib import Path
from smtplib import SMTPNotSupportedError
from typing import Any

import httpx
import pytest
from aiosmtpd.controller import Controller

from password_reset import passwords
from password_reset.accounts import open_accounts
from password_reset.config import Config
from password_reset.mail import deliverer
from password_reset.tokens import normalised
from tests.site import in_a_thread


def message() -> EmailMessage:
    made = EmailMessage()
    made["From"], made["To"], made["Subject"] = "no-reply@example.org", "ada@example.org", "Grüße"
    made.set_content("From the start:\nGrüße\n")
    return made


def test_messages_go_into_a_mailbox_file(tmp_path: Path) -> None:
    deliver = deliverer(None, tmp_path / "mailbox")
    deliver(message())
    deliver(message())
    box = mailbox.mbox(tmp_path / "mailbox")
    assert [str(each["To"]) for each in box] == ["ada@example.org"] * 2
    box.close()


class _Kept:
    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:  # noqa: N802  # aiosmtpd's name
        self.messages.append(envelope.content)
        return "250 OK"


def test_messages_go_to_an_smtp_server() -> None:
    kept = _Kept()
    port = _free_port()
    server = Controller(kept, hostname="127.0.0.1", port=port)
    server.start()
    try:
        deliverer(f"smtp://127.0.0.1:{port}", Path("unused"))(message())
        with pytest.raises(SMTPNotSupportedError):  # no password over a connection without TLS
            deliverer(f"smtp://user:password@127.0.0.1:{port}", Path("unused"))(message())
    finally:
        server.stop()
    (received,) = kept.messages
    assert message_from_bytes(received)["To"] == "ada@example.org"


def test_passwords() -> None:
    stored = passwords.hashed("a long enough password")
    assert stored != passwords.hashed("a long enough password")
    assert passwords.matches("a long enough password", stored)
    assert not passwords.matches("A long enough password", stored)
    assert "password" not in stored
    assert passwords.problem_of("x" * 14)
    assert passwords.problem_of("x" * 15) is None
    assert passwords.problem_of("x" * 257)


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        (" Ada@Example.ORG\n", "ada@example.org"),
        ("ada", None),
        ("@example.org", None),
        ("ada@", None),
        ("a@b\nBcc: c@d", None),
        ("a b@c", None),
        ("a" * 250 + "@example.org", None),
    ],
)
def test_addresses(typed: str, address: str | None) -> None:
    assert normalised(typed) == address


def test_a_secret_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    data = tmp_path / "data"
    environ = {"APP_DATA": str(data)}
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(Config.from_env, [environ] * 4))
    assert len({config.secret for config in found}) == 1
    assert stat.S_IMODE((data / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert found[0].secret not in repr(found[0])
    assert Config.from_env(environ | {"VTOKEN_SECRET": "t" * 32}).secret == "t" * 32


def test_the_options_of_the_tokens_are_not_the_drivers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path.as_posix()}/app.db?shared=true"
    options = "synchronous=normal&busy_timeout=10000&check=never&reads=worker"

    async def is_empty() -> bool:
        accounts = await open_accounts(f"{url}&{options}")
        try:
            return await accounts.is_empty()
        finally:
            await accounts.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_a_thread(is_empty())


def test_the_command(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("VTOKEN")}
    environ |= {"APP_DATA": str(tmp_path), "APP_BASE_URL": f"http://127.0.0.1:{_free_port()}"}
    command = [sys.executable, "-m", "password_reset"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            invitation = ""
            for line in process.stderr:
                if "Invitation: " in line:
                    invitation = line.split()[-1]
                if "Uvicorn running" in line:
                    break
            assert invitation.startswith(environ["APP_BASE_URL"])
            answer = httpx.get(invitation, trust_env=False)
            assert answer.status_code == 200
            assert "You are invited" in answer.text
        finally:
            process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert "Application shutdown complete" in rest
    assert "key=" not in rest


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
