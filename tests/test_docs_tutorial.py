"""The tutorial, followed word for word: its application, and what it says that you will see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks
from tests.web_tools import serving

PAGE = ROOT / "docs" / "tutorial.md"


async def test_its_application_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [block.code for block in blocks(PAGE) if block.info == "python"]
    namespace: dict[str, object] = {}
    exec(compile(code, "app.py", "exec", dont_inherit=True), namespace)  # noqa: S102  # our own page
    app, passwords = namespace["app"], namespace["passwords"]
    async with serving(app) as client:  # type: ignore[arg-type]  # a FastAPI application
        assert 'name="email"' in (await client.get("/forgot")).text
        known = await client.post("/forgot", data={"email": "ada@example.org"})
        mail = capsys.readouterr().out
        unknown = await client.post("/forgot", data={"email": "nobody@example.org"})
        again = await client.post("/forgot", data={"email": "ada@example.org"})  # within the cooldown
        unknown_again = await client.post("/forgot", data={"email": "nobody@example.org"})
        assert known.text == unknown.text == again.text == unknown_again.text
        assert known.status_code == unknown_again.status_code == 200
        assert capsys.readouterr().out == ""
        found = re.fullmatch(
            r"To ada@example\.org: http://127\.0\.0\.1:8000/reset\?key=([A-Za-z0-9]{32})\n", mail
        )
        assert found
        key = found[1]
        for _ in range(2):
            form = await client.get("/reset", params={"key": key})
            assert form.status_code == 200
            assert f'name="key" type="hidden" value="{key}"' in form.text
            assert form.headers["Referrer-Policy"] == "no-referrer"
        changed = await client.post("/reset", data={"key": key, "password": "new password"})
        assert changed.text == "Your password is changed."
        refused = await client.post("/reset", data={"key": key, "password": "evil password"})
        assert refused.status_code == 400
        looked = await client.get("/reset", params={"key": key})
        assert looked.status_code == 400
        assert refused.text == looked.text
        assert looked.json()["detail"] == "The token is not valid."
    assert passwords == {"ada@example.org": "new password"}
