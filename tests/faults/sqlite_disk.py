"""A disk that loses its power: the writes and syncs of a real process, recorded by ``syscalls.c``, make the
images that a disk may show afterwards.

What was synced is there. Of each write that was not, all, nothing or some sectors are there, whatever became
of the writes before it. Names (files made and removed) come back in order, up to a point; all of them
are there once the directory was synced.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

SECTOR: Final = 512
_HEAD: Final = struct.Struct("<cHQQ")


class Event(NamedTuple):
    """One call. ``kind``: Write, Truncate, Sync, Create, Unlink, Note (what the process told), or Failed."""

    kind: str
    name: str
    offset: int
    data: bytes


def read_record(path: Path) -> list[Event]:
    return list(_events(path.read_bytes()))


def _events(record: bytes) -> Iterator[Event]:
    at = 0
    while at < len(record):
        kind, name_length, offset, length = _HEAD.unpack_from(record, at)
        at += _HEAD.size
        name = record[at : at + name_length].decode()
        at += name_length
        yield Event(kind.decode(), name, offset, record[at : at + length])
        at += length


class _File:
    def __init__(self) -> None:
        self._durable = bytearray()
        self._pending: list[tuple[int, bytes | None]] = []

    def write(self, offset: int, data: bytes) -> None:
        self._pending.append((offset, data))

    def truncate(self, size: int) -> None:
        self._pending.append((size, None))

    def sync(self) -> None:
        for offset, data in self._pending:
            _put(self._durable, offset, data)
        self._pending.clear()

    def after_power_loss(self, chance: random.Random, kept: float) -> tuple[bytes, int]:
        """The content, and how many calls were undone at least in part."""
        content, undone = bytearray(self._durable), 0
        for offset, data in self._pending:
            fate = chance.random()
            if fate < kept:
                _put(content, offset, data)
                continue
            undone += 1
            if data is not None and fate > (1 + kept) / 2:
                for begin, end in _sectors(offset, len(data)):
                    if chance.random() < 0.5:
                        _put(content, begin, data[begin - offset : end - offset])
        return bytes(content), undone


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        data = b""
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    begin = offset
    while begin < offset + length:
        end = min(offset + length, (begin // SECTOR + 1) * SECTOR)
        yield begin, end
        begin = end


class Disk:
    """The files of one directory."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._pending_names: list[tuple[str, _File | None]] = []

    def apply(self, events: Sequence[Event]) -> None:
        for event in events:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        match event.kind:
            case "C":
                self._rename(event.name, _File())
            case "U":
                self._rename(event.name, None)
            case "W":
                self._names[event.name].write(event.offset, event.data)
            case "T":
                self._names[event.name].truncate(event.offset)
            case "S" if event.name in self._names:
                self._names[event.name].sync()
            case "S":
                self._settle_names(len(self._pending_names), self._durable_names)
                self._pending_names.clear()
            case _:
                """Nothing that changes a file."""

    def _rename(self, name: str, file: _File | None) -> None:
        self._pending_names.append((name, file))
        if file is None:
            del self._names[name]
        else:
            self._names[name] = file

    def _settle_names(self, count: int, names: dict[str, _File]) -> None:
        for name, file in self._pending_names[:count]:
            if file is None:
                names.pop(name, None)
            else:
                names[name] = file

    def after_power_loss(self, chance: random.Random) -> tuple[dict[str, bytes], int]:
        """The files, and how many writes or names were undone at least in part."""
        names = dict(self._durable_names)
        survivors = chance.randint(0, len(self._pending_names))
        self._settle_names(survivors, names)
        undone = len(self._pending_names) - survivors
        kept = chance.choice((0.0, 0.2, 0.5, 0.8))
        contents: dict[str, bytes] = {}
        for name, file in names.items():
            if name.endswith("-shm"):  # shared memory: who opens the store first makes it anew
                continue
            contents[name], lost = file.after_power_loss(chance, kept)
            undone += lost
        return contents, undone
