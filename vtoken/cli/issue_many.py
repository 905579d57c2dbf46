"""The command ``issue-many``: a token for each object of a file."""

from __future__ import annotations

import asyncio
import codecs
import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final, TextIO, cast

from cyclopts import Parameter

from vtoken.backend import Match, StoredToken, TokenBackend
from vtoken.cli.options import (
    Caller,
    ExpiresIn,
    ExtraData,
    Slug,
    Store,
    checked_slug,
    extra_data_of,
    lifetime,
    subject_of,
)
from vtoken.cli.output import Result, iso, pairs, without_policy
from vtoken.cli.terminal import Interrupted, progress
from vtoken.errors import InvalidInput
from vtoken.keys import batch_nonce
from vtoken.subject import ContentTypes, Subject
from vtoken.token import VerificationToken

_STORE = Store()  # the default of the shared options; it is frozen
_CALLER = Caller()
_FIELDS: Final = ("id", "content_type", "object_id", "slug", "expires_at", "key", "code")
_NAMES: Final = ("subject", "content_type", "object_id")
_LINE: Final = 4_000
_HEADER: Final = (
    "needs the columns content_type and object_id, named in the first line and separated by commas, or lines"
    " of content_type:object_id"
)


def issue_many(
    file: Annotated[
        str,
        Parameter(
            name="FILE",
            help="CSV with the columns content_type and object_id, or with one column of"
            " content_type:object_id; or JSON lines with the same names. - reads standard input.",
            allow_leading_hyphen=True,
        ),
    ],
    /,
    *,
    slug: Slug = None,
    batch: Annotated[
        str | None,
        Parameter(
            help="The name of this run, for a policy with derived keys: started again, it creates no token"
            " twice and gives the same keys."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(
            help="Where the keys go: a file that only its owner can read, CSV if it ends with .csv, else JSON"
            " lines. Keys of an earlier run of the same batch are replaced, those of another run never. Left"
            " out: standard output."
        ),
    ] = None,
    expires_in: ExpiresIn = None,
    extra: ExtraData = None,
    caller: Caller = _CALLER,
    store: Store = _STORE,
) -> Coroutine[Any, Any, Result]:
    """Issue a token for each object of a file, and write down their keys.

    The whole file is checked before anything is issued. Until the run has come to its end, the keys are in a
    file beside --out whose name ends with .part. Interrupted, it is started again: with --batch it goes on
    where it was, and its output is whole. A key is empty where an earlier run of the batch created a token
    that is over.
    """
    slug, expires, extra_data = checked_slug(slug), lifetime(expires_in), extra_data_of(extra)
    options: dict[str, Any] = {
        "batch": batch,
        "extra_data": extra_data,
        "expires_in": expires,
        "context": caller.context,
        "by": caller.dimensions(),
    }
    # Before the event loop runs: a blocking read inside it would not react to Ctrl-C.
    with ExitStack() as stack:
        content = stack.enter_context(_content(file))
        count, repeated = _counted(_subjects(content))
        stack.pop_all()  # the coroutine closes it
    if batch is not None:
        repeated = 0  # an object's token is the same each time
    return _issue(content, (count, repeated), slug, options, out, store)


async def _issue(
    content: TextIO,
    counted: tuple[int, int],
    slug: str | None,
    options: dict[str, Any],
    out: Path | None,
    store: Store,
) -> Result:
    issued = over = 0
    count, repeated = counted
    with content:
        async with store.opened(may_make_it=True) as manager:
            note = "; ".join(filter(None, [without_policy(manager.policies, slug), _dead_keys(repeated)]))
            first_id = None if out is None else _first_id(out)
            if out is not None and first_id is not None:
                await _check_batch(out, first_id, manager.backend, options["batch"])
            with _written(out, options["batch"]) as write, progress("issuing", count) as bar:
                tokens = manager.issue_many(_subjects(content), slug, progress=bar, **options)
                async for token in tokens:
                    write(token)
                    issued += token.key is not None
                    over += token.key is None
    data = {"issued": issued, "over": over, "out": None if out is None else str(out), "note": note or None}
    rows: list[tuple[str, object]] = [("issued", issued)]
    if over:
        rows.append(("over already", over))
    if out is not None:
        rows.append(("written to", out))
    if note:
        rows.append(("note", note))
    if out is not None:
        return Result(data, pairs(rows))
    print(", ".join(f"{name} {value}" for name, value in rows), file=sys.stderr)
    return Result({}, None)


def _counted(subjects: Iterable[Subject]) -> tuple[int, int]:
    """How many objects there are, and how many of these have come before."""
    count, seen = 0, set[int]()
    for subject in subjects:
        count += 1
        seen.add(hash((subject.content_type, subject.object_id)))  # not the texts: there may be millions
    return count, count - len(seen)


def _dead_keys(repeated: int) -> str | None:
    if not repeated:
        return None
    lines = "1 line names" if repeated == 1 else f"{repeated} lines name"
    return f"{lines} an object that came before: of its keys the last one is valid, and the others are over"


# What comes in -----------------------------------------------------------------------------------


def _content(file: str) -> TextIO:
    """The file; standard input is kept in a temporary file, because it is read twice."""
    problem = "it is read twice, so it must be a file, or - for standard input"
    try:
        if file == "-":
            made = tempfile.TemporaryFile  # the caller closes it
            spooled = cast("TextIO", made("w+", encoding="utf-8", newline=""))
            for line in codecs.getreader("utf-8-sig")(sys.stdin.buffer):
                spooled.write(line)
            return spooled
        if Path(file).is_file() or not Path(file).exists():
            return Path(file).open(encoding="utf-8-sig", newline="")  # as long as the command
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except ValueError:
        problem = "it is not UTF-8 text"
    raise InvalidInput(f"FILE cannot be read: {file}: {problem}")


def _subjects(content: TextIO) -> Iterator[Subject]:
    """The objects of a file, from its beginning.

    Raises:
        InvalidInput: a line is something else; the message says which one.
    """
    content.seek(0)
    problem, line = "", 1
    try:
        start = content.read(1)
        content.seek(0)
        read = _json_lines if start in ("{", '"') else _csv_rows
        for line, found in read(content):  # noqa: B007  # named in the message below
            yield _subject(found)
    except InvalidInput as error:
        problem = str(error)
    except (ValueError, csv.Error):
        problem = "neither CSV nor JSON lines in UTF-8"
    if problem:
        raise InvalidInput(f"FILE, line {line}: {problem}")


def _json_lines(content: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content, 1):
        if line.strip():
            found: Any = None
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
            yield number, found


def _csv_rows(content: Iterable[str]) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(content)
    names: list[str] | None = None
    for row in rows:
        if not any(field.strip() for field in row):
            continue
        if names is None:
            header = [field.strip().lower() for field in row]
            if any(name in header for name in _NAMES):
                names = header
                continue
            if not any(":" in field for field in row):
                raise InvalidInput(_HEADER)
            names = ["subject"]
        yield rows.line_num, dict(zip(names, row, strict=False))


def _subject(found: Any) -> Subject:
    """An object, from a text or from named fields."""
    if isinstance(found, dict):
        fields = cast("dict[str, Any]", found)
        found = fields.get("subject")
        if found is None and fields.get("content_type") is not None:
            found = Subject(fields["content_type"], fields.get("object_id", ""))
    subject = subject_of(found.strip()) if isinstance(found, str) else found
    if not isinstance(subject, Subject):
        raise InvalidInput("needs content_type and object_id, or subject")
    content_type, object_id = ContentTypes().resolve(subject)
    return Subject(content_type, object_id or "")


# What goes out -----------------------------------------------------------------------------------


@contextmanager
def _written(out: Path | None, batch: str | None) -> Generator[Callable[[VerificationToken], None]]:
    """Write tokens with their keys. What was written is kept, also where the run ends with an error."""
    go_on = "the same command again issues the rest, and writes all keys"
    if batch is None:
        go_on = "without --batch the same command would issue them anew"
    if out is None:
        try:
            yield _writer(sys.stdout, as_csv=False)
        except asyncio.CancelledError:
            raise Interrupted(f"what was issued before is written; {go_on}") from None
        finally:
            sys.stdout.flush()
        return
    part = out.with_name(f"{out.name}.part")
    part.unlink(missing_ok=True)  # what an earlier run left there may belong to somebody else
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        try:
            yield _writer(file, as_csv=out.suffix.lower() == ".csv")
        except asyncio.CancelledError:
            raise Interrupted(f"what was issued before is in {part}; {go_on}") from None
        except Exception as error:
            error.add_note(f"what was issued before is in {part}")
            raise
        finally:
            file.flush()
            os.fsync(file.fileno())
    part.replace(out)


def _writer(file: TextIO, *, as_csv: bool) -> Callable[[VerificationToken], None]:
    if not as_csv:
        return lambda token: print(json.dumps(_fields(token)), file=file)
    rows: csv.DictWriter[str] = csv.DictWriter(file, _FIELDS)
    rows.writeheader()
    return lambda token: cast("None", rows.writerow(_fields(token)))


def _fields(token: VerificationToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "content_type": token.content_type,
        "object_id": token.object_id,
        "slug": token.slug,
        "expires_at": iso(token.expires_at),
        "key": token.key,
        "code": token.code,
    }


def _first_id(out: Path) -> str | None:
    """The id of the first token in an earlier output of this command; None where there is none.

    Raises:
        InvalidInput: the file is something else.
        OSError: it cannot be read; what cannot be looked at is not replaced.
    """
    if not out.exists():
        return None
    with out.open(encoding="utf-8", errors="replace", newline="") as file:
        first, second = file.readline(_LINE), file.readline(_LINE)
    found = ""
    if first.startswith('{"id": "'):
        found = first.split('"')[3]
    elif first.startswith(",".join(_FIELDS)):
        found = second.partition(",")[0]
    elif first:
        raise InvalidInput(f"--out: {out} exists and is not an output of issue-many")
    return found or None


async def _check_batch(out: Path, first_id: str, backend: TokenBackend, batch: str | None) -> None:
    """Refuse to replace the keys of another run, which nobody can make again.

    Raises:
        InvalidInput: the first of them is not of this batch.
    """
    found = await backend.find(Match(id=first_id), 1)
    if not any(_is_of_batch(token, batch) for token in found):
        raise InvalidInput(f"--out: {out} has the keys of another run: name another file, or move it away")


def _is_of_batch(token: StoredToken, batch: str | None) -> bool:
    if batch is None:
        return False
    nonce = batch_nonce(batch, token.content_type, token.object_id, token.slug)
    return any(key.nonce == nonce for key in token.keys)
