"""The tutorial, followed word for word: its application, and what it says that you will see."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks
from tests.web_tools import serving

PAGE = ROOT / "docs" / "tutorial.md"
NOT_VALID = {"detail": "The token is not valid."}


def test_its_commands_ask_for_what_the_application_has() -> None:
    """What the test below sends is what the page's commands send."""
    commands = "".join(block.code for block in blocks(PAGE) if block.info.startswith("sh"))
    bodies = re.findall(r"--json ('.*?'|\".*\") (\S+)$", commands, re.MULTILINE)
    sent = [
        (url.removeprefix("http://127.0.0.1:8000"), json.loads(re.sub(r"\\(.)", r"\1", body[1:-1])))
        for body, url in bodies
    ]
    assert sent == [
        ("/forgot", {"email": "ada@example.org"}),
        ("/reset", {"key": "$key", "password": "new password"}),
        ("/reset", {"key": "$key", "password": "evil password"}),
    ]
    assert commands.count('curl "http://127.0.0.1:8000/reset?key=$key"') == 2


async def test_its_application_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [block.code for block in blocks(PAGE) if block.info == "python"]
    namespace: dict[str, object] = {}
    exec(compile(code, "app.py", "exec", dont_inherit=True), namespace)  # noqa: S102  # our own page
    app, passwords = namespace["app"], namespace["passwords"]
    async with serving(app) as client:  # type: ignore[arg-type]  # a FastAPI application
        known = await client.post("/forgot", json={"email": "ada@example.org"})
        mail = capsys.readouterr().out
        unknown = await client.post("/forgot", json={"email": "nobody@example.org"})
        again = await client.post("/forgot", json={"email": "ada@example.org"})  # within the cooldown
        assert known.text == unknown.text == again.text
        assert capsys.readouterr().out == ""
        found = re.fullmatch(
            r"To ada@example\.org: http://127\.0\.0\.1:8000/reset\?key=([A-Za-z0-9]{32})\n", mail
        )
        assert found
        key = found[1]
        for _ in range(2):
            assert (await client.get("/reset", params={"key": key})).status_code == 200
        changed = await client.post("/reset", json={"key": key, "password": "new password"})
        assert changed.json() == "Your password is changed."
        refused = await client.post("/reset", json={"key": key, "password": "evil password"})
        assert (refused.status_code, refused.json()) == (400, NOT_VALID)
        assert (await client.get("/reset", params={"key": key})).json() == NOT_VALID
    assert passwords == {"ada@example.org": "new password"}
