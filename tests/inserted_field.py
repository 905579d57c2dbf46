"""``python -m tests.inserted_field``: a token's life, with a field more in a record, at each place in turn.

Records are built, read and changed by field name, so a new field may stand anywhere. Each time, the modules
are imported afresh from a source in which the record has a further field, which nobody names.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Final

RECORDS: Final = ("StoredToken", "StoredKey", "StoredHold")
MODULE: Final = "vtoken.backend"
_DEFAULT: Final = """

def _with_default(record):
    plain = record.__new__

    def __new__(cls, *args, **fields):
        assert not args, "a record is built by position"
        fields.setdefault("inserted", "as it was")
        return plain(cls, **fields)

    record.__new__ = __new__


_with_default({record})
"""


def places(source: str, record: str) -> list[int]:
    """The lines before which a field can be inserted into a record, and the one behind its last field."""
    [found] = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == record]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    last = found.body.index(fields[-1])
    documented = found.body[last + 1] if last + 1 < len(found.body) else fields[-1]
    behind = documented if isinstance(documented, ast.Expr) else fields[-1]
    return [node.lineno for node in fields] + [(behind.end_lineno or 0) + 1]


class Inserting(SourceFileLoader):
    """Loads the module with a field more."""

    record = ""
    line = 0

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        lines = source.splitlines(keepends=True)
        lines.insert(self.line - 1, "    inserted: str\n")
        text = "".join(lines) + _DEFAULT.format(record=self.record)
        return compile(text, self.path, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    """Finds the module by :class:`Inserting`, and all others as ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Inserting(fullname, spec.origin)
        return spec


def fresh() -> Any:
    """The library, imported afresh."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vtoken", "vtoken_backends")]:
        del sys.modules[name]
    return importlib.import_module("vtoken")


async def life(vtoken: Any) -> list[str]:
    """What becomes of tokens, in words that do not depend on the records' fields."""
    policies = [
        vtoken.TokenPolicy.pair(
            "log-in", overlap="5m", key_storage="derived", issue_limits=[vtoken.Limit(20, "1d")]
        ),
        vtoken.TokenPolicy.code("sms", issue_limits=[vtoken.Limit(20, "1d")]),
        vtoken.TokenPolicy("bound", context="required"),
    ]
    settings = vtoken.Settings(secret="a secret of this test, 32 bytes or more")
    ada, said = vtoken.Subject("auth.user", "ada"), list[str]()
    async with vtoken.TokenManager.from_url("memory://", settings=settings, policies=policies) as manager:

        async def tried(call: Any) -> None:
            try:
                answer = await call
            except vtoken.VTokenError as error:
                said.append(f"{type(error).__name__} {getattr(error, 'reason', '')}")
            else:
                said.append(f"{getattr(answer, 'uses', answer)}")

        old = await manager.issue(ada, "log-in")
        new = await manager.issue(ada, "log-in")
        said.append(str((await manager.get_active_or_create(ada, "log-in")).key == new.key))
        await tried(manager.verify(ada, "log-in", old.key))
        for _ in range(2):
            await tried(manager.consume(ada, "log-in", old.code, consume_id="form"))
        for key in (old.key, new.key, new.code):
            await tried(manager.consume(ada, "log-in", key))
        code = await manager.issue(ada, "sms")
        async with manager.redeem(ada, "sms", code.key):
            await tried(manager.consume(ada, "sms", code.key))
            await tried(manager.deactivate(ada))
        await tried(manager.consume(ada, "sms", code.key))
        bound = await manager.issue(ada, "bound", context="x")
        other = await manager.issue(ada, "bound", context="y")
        await tried(manager.consume(ada, "bound", bound.key, context="y"))
        await tried(manager.consume(ada, "bound", other.key, context="y"))
        await tried(manager.consume(ada, "bound", bound.key, context="x"))
        bound.set_extra_data({"a": 1})
        await manager.save(bound)
        await manager.pretend(ada, "sms")
        many = [token async for token in manager.issue_many([ada], "log-in", batch="b")]
        again = [token async for token in manager.issue_many([ada], "log-in", batch="b")]
        said.append(str([token.key for token in many] == [token.key for token in again]))
        said.append(str([token.is_active async for token in manager.history(ada)]))
        found = await manager.backend.find(importlib.import_module(MODULE).Match(), 100)
        said.append(str({value for one in found for value in inserted(one)}))
        await tried(manager.purge())
        await tried(manager.erase(ada))
    return said


def inserted(token: Any) -> list[str]:
    """What the further field holds, of a record and of those in it."""
    return [one.inserted for one in (token, *token.keys, *token.holds) if hasattr(one, "inserted")]


def main() -> None:
    expected = asyncio.run(life(fresh()))
    source = SourceFileLoader(MODULE, importlib.import_module(MODULE).__file__ or "").get_data(
        importlib.import_module(MODULE).__file__ or ""
    )
    sys.meta_path.insert(0, Finder())
    count = 0
    for record in RECORDS:
        for line in places(source.decode(), record):
            Inserting.record, Inserting.line = record, line
            played = asyncio.run(life(fresh()))
            kept = [text.replace("{'as it was'}", "set()") for text in played]
            assert kept == expected, f"a field in line {line} of {record}:\n{played}\n{expected}"
            assert record == "StoredHold" or "{'as it was'}" in played
            count += 1
    print(f"{count} places, each with the same life: {', '.join(expected)}")


if __name__ == "__main__":
    main()
