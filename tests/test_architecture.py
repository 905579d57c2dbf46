"""The rules of the layout, read from the source: imports run one way, and the core knows no driver."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import vtoken
import vtoken.testing
import vtoken_backends

from .calls import measured

ROOT = Path(__file__).parent.parent
CORE = Path(vtoken.__file__).parent
BACKENDS = Path(vtoken_backends.__file__).parent

LAYERS = [
    {"errors", "ids", "process", "redact", "stats", "_version"},
    {"backend"},
    {"inputs"},
    {"loading", "token", "subject", "opening"},
    {"keys", "hooks"},
    {"limits"},
    {"policy", "registry", "sweeper"},
    {"issuing", "redeeming", "config_read", "diagnostics"},
    {"config"},
    {"manager"},
    {"migrate", "testing", "sync", "contrib"},
    {"cli"},
    {"__main__"},
]
"""The core from the ground up: a module imports what stands on the lines above its own, and nothing else."""

THIRD_PARTY = {
    "cli": {"anyio", "cyclopts", "rich"},
    "migrate": {"anyio", "sqlalchemy"},
    "testing": {"anyio", "hypothesis", "pytest"},
}
"""What a part of the core may import beside the standard library; others, anyio; ``contrib``, anything."""

DRIVERS = {
    "memory": set[str](),
    "batching": {"anyio"},
    "sqlite": {"anyio"},
    "mongodb": {"anyio", "bson", "motor", "pymongo"},
    "postgresql": {"anyio", "psycopg", "psycopg_pool"},
}
"""What a backend may import beside the standard library and the protocol; ``batching`` is for all of them."""

FROM_THE_CORE = {"backend", "errors", "inputs", "redact", "token"}
"""What a backend may know of the core: the protocol, how to suggest the right spelling of an option, and how
to keep a password out of a traceback."""

OF_DIAGNOSTICS = {"diagnostics", "loading", "registry"}
"""What its diagnostics, which the command line asks, may know beside that."""

MAX_LINES = 60
"""Of a function, without its docstring."""


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def part(module: Path) -> str:
    """The name under which a module of the core stands in :data:`LAYERS`."""
    return module.relative_to(CORE).parts[0].removesuffix(".py")


@cache
def imports(module: Path) -> list[str]:
    """The dotted names that a module imports, anywhere in it but where only type checkers look."""
    names: list[str] = []
    for node in running(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}:{node.lineno}: relative import"
            assert node.module is not None
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return names


def running(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, without what stands under ``if TYPE_CHECKING:``."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from running(child)


def of_the_core(module: Path) -> set[str]:
    """What a module imports of the core; ``import vtoken`` itself is ``"__init__"``, which is on no layer."""
    names = (name.split(".") for name in imports(module))
    return {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "vtoken"}


def third_party(module: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imports(module)}
    return tops - sys.stdlib_module_names - {"vtoken", "vtoken_backends"}


def relative(paths: list[Path], start: Path) -> list[str]:
    return [str(path.relative_to(start)) for path in paths]


@pytest.mark.parametrize("module", modules(CORE), ids=relative(modules(CORE), CORE))
def test_the_core_imports_downwards_only(module: Path) -> None:
    if module == CORE / "__init__.py":
        return  # re-exports what is public
    (level,) = (n for n, layer in enumerate(LAYERS) if part(module) in layer)
    allowed: set[str] = set().union(*LAYERS[:level])
    if module.parent != CORE:
        allowed.add(part(module))  # the modules of a subpackage know each other
    assert of_the_core(module) <= allowed


@pytest.mark.parametrize("module", modules(CORE), ids=relative(modules(CORE), CORE))
def test_the_core_imports_no_driver_and_only_the_registry_names_a_backend(module: Path) -> None:
    name = part(module)
    assert "sqlite3" not in {imported.split(".")[0] for imported in imports(module)}
    if name != "contrib":
        assert third_party(module) <= THIRD_PARTY.get(name, {"anyio"})
    assert ("vtoken_backends" in module.read_text()) is (name == "registry")


def test_init_only_re_exports() -> None:
    for node in ast.parse((CORE / "__init__.py").read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"line {node.lineno}"


def test_importing_vtoken_loads_no_driver() -> None:
    heavy = {"aiosqlite", "bson", "cyclopts", "motor", "pymongo", "pytest", "rich", "sqlite3", "trio"}
    heavy |= {"vtoken_backends", "vtoken.testing", "vtoken.cli"}
    code = f"import sys, vtoken; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", modules(BACKENDS), ids=relative(modules(BACKENDS), BACKENDS))
def test_a_backend_knows_the_protocol_and_its_own_driver(module: Path) -> None:
    own = module.relative_to(BACKENDS).parts[0].removesuffix(".py")
    known = FROM_THE_CORE | OF_DIAGNOSTICS if module.stem == "diagnostics" else FROM_THE_CORE
    assert of_the_core(module) <= known
    if own == "__init__":
        assert imports(module) == []
        return
    assert third_party(module) <= DRIVERS[own]
    others = {name.split(".")[1] for name in imports(module) if name.startswith("vtoken_backends.")}
    assert others <= {own, "batching"}, "a backend imports another"


def test_the_built_in_backends_are_all_in_the_registry() -> None:
    text = (CORE / "registry.py").read_text()
    named = set(re.findall(r"vtoken_backends[.]([a-z]+):", text))
    assert named == DRIVERS.keys() - {"batching"}


@pytest.mark.parametrize("folder", [CORE, BACKENDS, Path(__file__).parent], ids=lambda folder: folder.name)
def test_no_function_is_too_long_to_read(folder: Path) -> None:
    found: dict[str, int] = {}
    for module in modules(folder):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = length(node)
                if lines > MAX_LINES:
                    found[f"{module.relative_to(folder)}:{node.name}"] = lines
    assert found == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, its decorators and its docstring left out."""
    first = function.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
        docstring = first.end_lineno - first.lineno + 1
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("package", [CORE, BACKENDS], ids=lambda folder: folder.name)
def test_every_module_says_what_it_is_for(package: Path) -> None:
    silent = [
        str(m.relative_to(package))
        for m in modules(package)
        if not ast.get_docstring(ast.parse(m.read_text()))
    ]
    assert not silent


def test_a_field_may_be_inserted_anywhere_into_a_record() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.inserted_field"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"[0-9]{2} places, each with the same life", done.stdout)


def test_the_way_of_a_lone_consume_is_counted() -> None:
    passed = asyncio.run(measured())
    assert passed["consume"].files <= 12
    assert passed["issue"].files <= 12


def public_objects() -> list[tuple[str, Any]]:
    return [(n, getattr(p, n)) for p in (vtoken, vtoken.testing) for n in p.__all__ if n != "__version__"]


@pytest.mark.parametrize(("name", "thing"), public_objects(), ids=[name for name, _ in public_objects()])
def test_every_public_name_has_a_docstring(name: str, thing: Any) -> None:
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        assert name in documented_constants()
        return
    missing = [name] if not (thing.__doc__ or "").strip() else []
    for attribute, value in vars(thing).items():
        member = getattr(value, "__func__", value)  # what a classmethod wraps
        is_method = inspect.isfunction(member) or isinstance(member, property)
        if is_method and not attribute.startswith("_") and not (member.__doc__ or "").strip():
            missing.append(f"{name}.{attribute}")
    assert not missing


@cache
def documented_constants() -> set[str]:
    """Names that a module of the core assigns at its top level with a string right below."""
    found: set[str] = set()
    for module in modules(CORE):
        for node, following in pairwise(ast.parse(module.read_text()).body):
            if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(following, ast.Expr):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                found.add(ast.unparse(target))
    return found


def repository_files() -> list[Path]:
    """The files of the repository: all but what .gitignore names."""
    patterns = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]

    def kept(names: list[str]) -> list[str]:
        return [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]

    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = kept(folders)  # the others are not walked through
        found += (path for name in kept(files) if (path := Path(folder, name)).is_file())
    return sorted(found)


IGNORE = re.compile(
    r"(?:type|pyright): ignore(?:\[[^\]]*\])?|noqa(?::\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)?|pragma: no cover"
)
"""What silences a tool in a comment."""


def unreasoned(source: bytes) -> list[int]:
    """The lines whose comment silences a tool and does not say why."""
    comments = (t for t in tokenize.tokenize(BytesIO(source).readline) if t.type == tokenize.COMMENT)
    silencing = ((t.start[0], t.string) for t in comments if IGNORE.search(t.string))
    return [line for line, text in silencing if not re.search("[A-Za-z]{2}", IGNORE.sub("", text))]


def test_every_ignore_has_its_reason_beside_it() -> None:
    sources = {path: path.read_bytes() for path in repository_files() if path.suffix in {".py", ".pyi"}}
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)): unreasoned(source) for path, source in sources.items()}
    assert not {path: lines for path, lines in found.items() if lines}


def test_an_ignore_without_a_reason_is_found() -> None:
    bare = [
        "# type: ignore[arg-type]",
        "# noqa: S101, PT018",
        "# noqa",
        "# pyright: ignore[reportX]  # noqa: S1",
    ]
    assert unreasoned("\n".join(f"x = 1  {comment}" for comment in bare).encode()) == [1, 2, 3, 4]
    assert unreasoned("\n".join(f"x = 1  {comment}  # on purpose" for comment in bare).encode()) == []
    assert unreasoned(b'x = "# type: ignore"') == []


def test_no_file_names_a_path_of_a_machine_or_a_registry() -> None:
    # An example may live in /home/me.
    place = r"(?<![\w.$}])/(?:root|home(?!/me\b)|Users|work|workspace)/\w"
    private = re.compile(rf"{place}|pypi\.org|pythonhosted|npmjs")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in repository_files()
        for match in private.finditer(path.read_text(errors="replace"))
        if path != Path(__file__)
    ]
    assert not found
