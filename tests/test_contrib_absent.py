"""Without their packages: every module can be imported, and says what to install when it is used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = ["aiohttp", "fastapi", "litestar", "opentelemetry", "prometheus_client", "starlette"]
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
        if name.partition(".")[0] in {PACKAGES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from vtoken import ConfigurationError, TokenEvent, TokenManager
manager = TokenManager.from_url("memory://")
event = TokenEvent("issued", datetime.now(UTC))
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
