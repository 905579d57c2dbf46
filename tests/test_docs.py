"""What the documentation shows, runs: every Python block of every page, a page's blocks in one namespace."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vtoken
from vtoken.backend import TokenBackend

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s#]+)[^)]*\)")
_LITERAL_SECRET = re.compile(r"""secrets?(?:["']\])?\s*=\s*\[?\s*f?["'](?!\$)""", re.IGNORECASE)
_PROMPT = b"\x1b[?2004h"
"""What the REPL of Python 3.13 sends when it is ready for a paste."""
_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>])")
_WIDEST = 84
"""Columns of code that a page of the site shows without a scroll bar."""


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    info: str
    code: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _FENCE.finditer(text):
        yield Block(text.count("\n", 0, found.start("code")), found["info"].strip(), found["code"])


def run_python(page: Path) -> dict[str, Any]:
    """Run the blocks marked ``python`` in their order; they may ``await`` anywhere, as in a REPL."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    with asyncio.Runner() as runner:
        for block in blocks(page):
            if block.info != "python":
                continue
            code = compile(
                "\n" * block.line + block.code,
                str(page),
                "exec",
                ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
                dont_inherit=True,
            )
            result = eval(code, namespace)  # noqa: S307  # our own pages
            if inspect.iscoroutine(result):
                runner.run(result)
    return namespace


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages tell people to set before they run an example."""
    monkeypatch.setenv("VTOKEN_SECRET", secrets.token_urlsafe(32))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page)


def paste(parts: list[str], cwd: Path) -> list[str]:
    """Paste each of the parts into ``python -m asyncio``; return the lines that it shows.

    Up to Python 3.12 it reads line by line, and a blank line ends what is indented. Since 3.13 it does so
    only without a terminal, and 3.13.0 then takes no indented block at all: so this pastes into a terminal.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON_HISTORY": str(cwd / "history")}
    command = [sys.executable, "-m", "asyncio"]
    if sys.version_info < (3, 13):
        done = subprocess.run(
            command, input="\n\n".join(parts), cwd=cwd, env=env, capture_output=True, text=True, check=True
        )
        return [line.lstrip(">. ") for line in (done.stderr + "\n" + done.stdout).splitlines()]
    env |= {"TERM": "xterm", "COLUMNS": "200", "LINES": "100", "NO_COLOR": "1"}
    env.pop("PYTHON_BASIC_REPL", None)
    terminal, end = os.openpty()
    with subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, cwd=cwd, env=env, start_new_session=True
    ) as repl:
        os.close(end)
        shown = b""
        try:
            for part in [*parts, None]:
                prompts = shown.count(_PROMPT) + 1
                while shown.count(_PROMPT) < prompts:
                    assert select.select([terminal], [], [], 30)[0], shown.decode()
                    shown += os.read(terminal, 65536)
                if part is not None:
                    os.write(terminal, b"\x1b[200~" + part.encode() + b"\x1b[201~\r")
        finally:
            repl.kill()
            os.close(terminal)
    return [line.strip() for line in _CONTROL.sub("", shown.decode()).splitlines()]


def test_the_readmes_blocks_can_be_pasted(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    first, end = (
        text.count("\n", 0, text.index(what)) for what in ("You can paste the blocks", "## Backends")
    )
    pasted = [block.code for block in blocks(readme) if block.info == "python" and first < block.line < end]
    shown = paste([*pasted, "print(left, 'attempts left')\n"], tmp_path)
    assert not [line for line in shown if "Error" in line], shown
    assert "Your password is changed." in shown
    assert "4 attempts left" in shown


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_example_holds_a_secret_that_somebody_could_copy(page: Path) -> None:
    literal = [(block.line, block.info) for block in blocks(page) if _LITERAL_SECRET.search(block.code)]
    assert not literal, f"{page.name}: write os.environ['VTOKEN_SECRET']"


def test_a_literal_secret_is_found() -> None:
    for code in ('Settings(secret="abc")', "old_secret = 'abc'", 'VTOKEN_SECRET="abc"', 'secrets=["abc"]'):
        assert _LITERAL_SECRET.search(code)
    for code in ('secret=os.environ["VTOKEN_SECRET"]', 'VTOKEN_SECRET="$(vtoken secret)"'):
        assert not _LITERAL_SECRET.search(code)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_fits_the_page(page: Path) -> None:
    # One command that does everything may be longer: it is copied, not read.
    wide = [
        f"{page.name}:{block.line + place}"
        for block in blocks(page)
        if "{" not in block.info and (not block.info.startswith("sh") or block.code.count("\n") > 1)
        for place, line in enumerate(block.code.splitlines(), 1)
        if len(line) > _WIDEST
    ]
    assert not wide


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_that_do_not_run_say_why(page: Path) -> None:
    for block in blocks(page):
        if block.info.startswith("python") and block.info != "python":
            assert re.fullmatch(r"python no-run: .{10,}", block.info), (
                f"{page.name}:{block.line}: {block.info!r}"
            )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = [found["target"] for found in _LINK.finditer(_FENCE.sub("", page.read_text()))]
    places = page.parent, Path(vtoken.__file__).parent.parent  # the packages may be installed elsewhere
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not any((place / target).exists() for place in places)]
    assert not missing


def test_the_readmes_answers_are_the_ones_it_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_python(ROOT / "README.md")
    claimed = re.findall(r"^ *print\(.*\)  # (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert claimed
    assert capsys.readouterr().out.splitlines() == claimed
    assert namespace["passwords"] == {"ada": "new"}


def test_the_readmes_sketch_of_a_backend_has_the_protocols_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sketch = run_python(ROOT / "README.md")["MyBackend"]
    methods = [name for name, _ in inspect.getmembers(TokenBackend, callable) if not name.startswith("_")]
    assert len(methods) == 18
    for name in methods:
        promised = inspect.signature(getattr(TokenBackend, name), eval_str=True)
        assert inspect.signature(getattr(sketch, name), eval_str=True) == promised, name


@pytest.mark.parametrize("tag", ["demo", "tests"])
def test_the_readme_has_one_command_that_sets_up_everything(tag: str) -> None:
    found = [block.code for block in blocks(ROOT / "README.md") if block.info == f"sh {tag}"]
    assert len(found) == 1
    assert found[0].count("\n") == 1, "one plain line"


def test_llms_txt_names_every_page_that_teaches() -> None:
    docs = ROOT / "docs"
    named = re.findall(r"\(_sources/(\S+\.md)\.txt\)", (docs / "llms.txt").read_text())
    assert len(named) == len(set(named))
    assert not [page for page in named if not (docs / page).is_file()]
    taught = {
        str(page.relative_to(docs))
        for folder in (".", "how-to", "explanation")
        for page in (docs / folder).glob("*.md")
        if folder == "." or page.name != "index.md"
    }
    assert taught <= set(named)
