"""Without optional packages: every module can be imported, and says what to install when it is used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vtoken
import vtoken.contrib
import vtoken.migrate

PACKAGES = ["aiohttp", "fastapi", "litestar", "opentelemetry", "prometheus_client", "starlette"]
DRIVERS = ["aiosqlite", "bson", "motor", "psycopg", "psycopg_pool", "pymongo"]
OTHERS = ["attrs", "cyclopts", "hypothesis", "pydantic", "pytest", "rich"]
MODULES = [
    found.name
    for package in (vtoken, vtoken.contrib, vtoken.migrate)
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if found.name
    not in ("vtoken.cli", "vtoken.migrate.tables")  # vtoken.__main__ says what the first one needs
]
USES = {
    "aiohttp": ["cleanup_ctx(manager)", "error_middleware()"],
    "fastapi": ["lifespan(manager)", "exception_handlers()"],
    "litestar": ["plugin(manager)"],
    "opentelemetry": ["hook()", "record(event)"],
    "prometheus": ["hook()", "record(event)"],
    "starlette": ["lifespan(manager)", "exception_handlers()"],
}

BLOCKED = f"""
import sys
from datetime import UTC, datetime

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PACKAGES + DRIVERS + OTHERS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from vtoken import ConfigurationError, TokenEvent, TokenManager
manager = TokenManager.from_url("memory://")
event = TokenEvent(name="issued", at=datetime.now(UTC))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "use"), [(module, use) for module, uses in USES.items() for use in uses])
def test_it_can_be_imported_and_says_what_to_install(module: str, use: str) -> None:
    code = f"""
from vtoken.contrib.{module} import *
try:
    {use}
except ConfigurationError as error:
    print(error)
"""
    said = run(BLOCKED + code)
    assert f'pip install "vtoken[{module}]"' in said
    assert "not installed" in said


def test_every_module_can_be_imported() -> None:
    assert run(f"{BLOCKED}\nimport {', '.join(MODULES)}") == ""


def test_every_integration_is_named_above() -> None:
    needs_nothing = {"logging"}
    integrations = {found.name for found in pkgutil.iter_modules(vtoken.contrib.__path__)}
    assert USES.keys() | needs_nothing == {name for name in integrations if not name.startswith("_")}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mongodb://host/db", 'pip install "vtoken[mongodb]"'),
        ("mongodb+srv://host.example.org/db", 'pip install "vtoken[mongodb]"'),
        ("postgresql://host/db", 'pip install "vtoken[postgresql]"'),
    ],
)
def test_a_missing_driver_is_named(url: str, said: str) -> None:
    code = f"""
from vtoken import create_backend
try:
    create_backend({url!r})
except ConfigurationError as error:
    print(error)
"""
    assert said in run(BLOCKED + code)


def test_a_missing_motor_is_named() -> None:
    code = """
import sys
sys.modules["motor"] = None
from vtoken import ConfigurationError, create_backend
try:
    create_backend("mongodb://host/db", driver="motor")
except ConfigurationError as error:
    print(error)
"""
    assert 'pip install "vtoken[motor]"' in run(code)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["stats", "--json"]])
def test_the_command_line_says_what_to_install(arguments: list[str]) -> None:
    code = f"""
import runpy
sys.argv[1:] = {arguments}
try:
    runpy.run_module("vtoken", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print(ended.code)
"""
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert "vtoken[cli]" in done.stderr


def test_logging_and_the_core_need_nothing() -> None:
    code = "import vtoken.contrib.logging, vtoken.sync, vtoken.sweeper; vtoken.contrib.logging.record(event)"
    assert run(BLOCKED + code) == ""


def test_a_package_that_is_broken_is_not_called_absent(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("from os import no_such_name")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import vtoken, vtoken.contrib.prometheus
try:
    vtoken.contrib.prometheus.hook()
except vtoken.ConfigurationError as error:
    print(error)
"""
    said = run(code)
    assert "cannot be imported" in said
    assert "no_such_name" in said
    assert 'pip install "vtoken[prometheus]"' in said


def test_there_is_an_extra_of_each_name() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert USES.keys() <= project["optional-dependencies"].keys()


def test_importing_a_module_of_contrib_loads_no_package_it_does_not_name() -> None:
    code = """
import sys
import vtoken.contrib.aiohttp, vtoken.contrib.litestar, vtoken.contrib.logging
import vtoken.contrib.opentelemetry, vtoken.contrib.prometheus, vtoken.contrib.starlette
"""
    assert run(f"{code}\nprint(*sorted(set({PACKAGES}) & sys.modules.keys()))").split() == []
