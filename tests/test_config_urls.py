"""Configuration: URLs to backends, and URLs that are printed."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from vtoken import (
    Configuration,
    ConfigurationError,
    Settings,
    TokenManager,
    create_backend,
    register_backend,
    registry,
)
from vtoken.config import redact_url
from vtoken.diagnostics import Diagnostics, diagnostics_of
from vtoken.sync import SyncTokenManager
from vtoken_backends.memory import MemoryBackend

MEMORY = {"VTOKEN_URL": "memory://"}


class PluginBackend(MemoryBackend):
    """A third party's backend."""


class PluginDiagnostics(Diagnostics):
    """What its author says about its stores."""


class BackendWithoutUrl:
    """It forgot ``from_url``."""


class LeakyBackend:
    """It puts its URL into its errors."""

    @classmethod
    def from_url(cls, url: str, **_: object) -> LeakyBackend:
        raise ValueError(f"cannot parse {url}")


class ModernBackend:
    """It needs a package that is not there."""

    @classmethod
    def from_url(cls, url: str, **_: object) -> ModernBackend:
        import no_such_driver  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]  # meant

        del no_such_driver
        return cls()


def plain_generator(length: int = 32) -> str:
    """A key generator."""
    return "k" * length


def _no_entry_points(**_: object) -> tuple[()]:
    return ()


@pytest.fixture(autouse=True)
def _registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


# URLs to backends --------------------------------------------------------------------------------


def test_an_unknown_scheme_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        ConfigurationError, match=r"memory, mongodb, mongodb\+srv, postgres, .*mean mongodb\?"
    ):
        create_backend("monogdb://localhost/db")


@pytest.mark.parametrize(
    "url",
    [
        "mongodb:/user:hunter2@host/db",
        "mongodb//user:hunter2@host/db",
        "mongodb:user:hunter2@host",
        "user:hunter2@mongodb://host",
        "nosuch://user:hunter2@host/db",
        "sqlite://user:hunter2@host/db",
        "memory://user:hunter2@host/db",
        "mongodb://user:hunter2@host/",
        "mongodb://user:hunter2/x@host/d",
        "mongodb://host/d?password=hunter2&nonsense=1",
        "leaky://user:hunter2@host/db",
        "leaky://host/db?apiToken=hunter2",
        "modern://user:hunter2@host/db",
        "",
        "://",
        "hunter2",
    ],
)
def test_no_error_about_a_url_holds_its_password(url: str) -> None:
    register_backend("leaky", f"{__name__}:LeakyBackend")
    register_backend("modern", f"{__name__}:ModernBackend")
    try:
        backend = create_backend(url)
    except ConfigurationError as error:
        chain: list[BaseException | None] = [error, error.__cause__, error.__context__]
        assert "hunter2" not in " ".join(map(str, chain)), url
        assert url.startswith("mongodb://") or chain[1:] == [None, None], "the driver's error is left behind"
    else:
        assert url.startswith("mongodb://"), "only the database's driver can tell, when it is opened"
        assert "hunter2" not in repr(backend)


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_backend("nosuch://user:hunter2@host/db"),
        lambda: create_backend("memory://user:hunter2@host/db"),
        lambda: TokenManager.from_url("sqlite://user:hunter2@host/db"),
        lambda: SyncTokenManager.from_url("sqlite:///x.db?password=hunter2"),
        lambda: Configuration.from_env({**MEMORY, "VTOKEN_SECRET": "hunter2"}),
        lambda: Configuration.from_env({**MEMORY, "VTOKEN_SECRET": "hunter2" * 8, "VTOKEN_HOOK": "x"}),
        lambda: Settings(secret="hunter2"),
    ],
)
def test_no_frame_of_a_refusal_holds_a_password_or_secret(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    ours = [
        frame for frame in frames if frame.f_code.co_filename.startswith(str(Path(registry.__file__).parent))
    ]
    assert ours
    assert not [frame for frame in ours if "hunter2" in f"{frame.f_locals}"]


@pytest.mark.parametrize("url", ["memory:///name", "memory://name/x", "memory://name?x=1", "memory://name#x"])
def test_a_memory_url_has_a_name_and_nothing_else(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory://name"):
        create_backend(url)


def test_a_class_is_taken_for_a_url() -> None:
    assert type(create_backend(f"{__name__}:PluginBackend")) is PluginBackend


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no_such_module:Backend", "no module 'no_such_module'"),
        (f"{__name__}:NoSuchBackend", "has no 'NoSuchBackend'"),
        ("package.module.Class", "named by a URL"),
        (f"{__name__}:plain_generator", "not a TokenBackend: it has no from_url, open"),
    ],
)
def test_a_class_that_is_not_there_is_named(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TokenManager.from_url(url)


def test_a_url_must_be_text() -> None:
    with pytest.raises(ConfigurationError, match="not bytes"):
        create_backend(b"memory://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the point


def test_a_backend_remembers_its_url_as_long_as_it_is_there() -> None:
    backend = create_backend("memory://")
    assert registry.url_of(backend) == "memory://"
    assert registry.url_of(MemoryBackend()) is None


def test_a_registered_scheme_goes_before_an_installed_one() -> None:
    register_backend("Memory", f"{__name__}:PluginBackend")
    assert type(create_backend("MEMORY://x")) is PluginBackend


def test_a_registered_class_is_imported_only_when_asked_for() -> None:
    register_backend("later", "no_such_package:Backend")
    create_backend("memory://")
    with pytest.raises(ConfigurationError, match="no_such_package"):
        create_backend("later://x")


@pytest.mark.parametrize(
    ("scheme", "path"), [("", "a:B"), ("1a", "a:B"), ("a b", "a:B"), ("a", "a.B"), ("a", "")]
)
def test_a_registration_that_cannot_work_is_refused(scheme: str, path: str) -> None:
    with pytest.raises(ConfigurationError):
        register_backend(scheme, path)


def test_a_backend_is_found_through_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "vtoken_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vtoken-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[vtoken.backends]\nplugin = {__name__}:PluginBackend\nbroken = no_such_package:Backend\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(create_backend("plugin://store")) is PluginBackend
    with pytest.raises(ConfigurationError, match=r"broken, memory, mongodb, .*, plugin, postgres"):
        create_backend("nosuch://x")


def test_a_built_in_scheme_needs_no_metadata_and_is_not_replaced_by_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "vtoken_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vtoken-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vtoken.backends]\nmemory = {__name__}:PluginBackend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(create_backend("memory://")) is MemoryBackend
    monkeypatch.setattr(registry, "entry_points", _no_entry_points)
    assert type(create_backend("memory://")) is MemoryBackend
    with pytest.raises(ConfigurationError, match="known are memory, mongodb"):
        create_backend("nosuch://x")


def test_every_built_in_backend_describes_itself() -> None:
    for scheme in ("memory", "mongodb", "mongodb+srv", "postgres", "postgresql", "sqlite"):
        assert type(diagnostics_of(f"{scheme}://host/name")) is not Diagnostics, scheme
    assert type(diagnostics_of("other://host")) is Diagnostics
    assert type(diagnostics_of("package.module:Class")) is Diagnostics
    register_backend("sqlite", f"{__name__}:PluginBackend")
    assert type(diagnostics_of("sqlite:///x.db")) is Diagnostics, "another backend has other stores"


def test_diagnostics_are_found_through_their_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "vtoken_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vtoken-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[vtoken.diagnostics]\nplugin = {__name__}:PluginDiagnostics\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(diagnostics_of("plugin://store")) is PluginDiagnostics


def test_a_backend_without_from_url_says_so() -> None:
    register_backend("bare", f"{__name__}:BackendWithoutUrl")
    with pytest.raises(ConfigurationError, match="from_url"):
        create_backend("bare://x")


def test_an_option_that_a_backend_does_not_have_is_named() -> None:
    with pytest.raises(ConfigurationError, match="nonsense"):
        create_backend(f"{__name__}:PluginBackend", nonsense=1)


@pytest.mark.parametrize(
    ("blocked", "call", "package", "extra"),
    [
        ("pymongo", "create_backend('mongodb://u:hunter2@h/d')", "pymongo", "mongodb"),
        ("motor", "create_backend('mongodb://u:hunter2@h/d', driver='motor')", "motor", "motor"),
    ],
)
def test_a_missing_driver_names_the_extra(blocked: str, call: str, package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{blocked!r}] = None
from vtoken import ConfigurationError, TokenManager, create_backend
import asyncio
async def main():
    async with TokenManager({call}): pass
try:
    asyncio.run(main())
except ConfigurationError as error:
    print(error, error.__cause__, error.__context__)
"""
    done = python(code)
    assert f'pip install "vtoken[{extra}]"' in done.stdout, done.stderr
    assert package in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_the_library_imports_no_driver() -> None:
    drivers = {"aiosqlite", "sqlite3", "pymongo", "bson", "motor", "cyclopts", "rich"}
    done = python(f"import sys, vtoken; print(sorted({drivers} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


# Redaction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("memory://", "memory://"),
        ("sqlite:////home/me@work/tokens.db", "sqlite:////home/me@work/tokens.db"),
        ("mongodb://user:p@host:27017/db", "mongodb://user:***@host:27017/db"),
        ("mongodb://user:p@ss/w:rd@host/db", "mongodb://user:***@host/db"),
        ("mongodb+srv://user@host:27017/db", "mongodb+srv://user@host:27017/db"),
        ("mongodb://:p@host", "mongodb://:***@host"),
        ("mongodb:/user:p@host", "mongodb:/user:***@host"),
        ("mongodb:user:p@host", "mongodb:***@host"),
        (
            "mongodb://host/db?tls=true&tlsCertificateKeyFilePassword=hush&w=1",
            "mongodb://host/db?tls=true&tlsCertificateKeyFilePassword=***&w=1",
        ),
        ("postgresql://host/db?user=me;PASSWORD=hush", "postgresql://host/db?user=me;PASSWORD=***"),
        ("x://host/?p%61ssword=hush", "x://host/?p%61ssword=***"),
        (
            "mongodb://host/?authMechanismProperties=AWS_SESSION_TOKEN:hush",
            "mongodb://host/?authMechanismProperties=***",
        ),
        ("package.module:Class", "package.module:Class"),
        ("x://host/db?pw=hush&key=hush&auth=hush&w=1", "x://host/db?pw=***&key=***&auth=***&w=1"),
        ("x://host/db#hush", "x://host/db#***"),
        ("x://host/db?w=1#pw=hush", "x://host/db?w=1#***"),
    ],
)
def test_redacted_urls(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted
