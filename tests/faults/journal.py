"""Histories on disk: each client writes down what it is about to do, and what came of it.

A line is on the disk before the operation begins, and before anything is built on its result.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.faults.linear import NEVER_RETURNED, Operation

CAPPED: Final = "sms"
PLAIN: Final = "reset"
OPERATIONS_PER_SUBJECT: Final = 60


def purpose(subject: str) -> str:
    """The slug of a subject: every fourth has a cap."""
    return PLAIN if int(subject) % 4 else CAPPED


class Journal:
    """The history that one process writes.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def write(self, **line: Any) -> None:
        """Append a line, with the time, and see to it that it is on the disk."""
        at = time.monotonic_ns()  # CLOCK_MONOTONIC: the same for all processes of a machine
        os.write(self._file, (json.dumps({"at": at, **line}) + "\n").encode())
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Tail:
    """Follows all journals of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[Path, Any] = {}
        self._begun: dict[Path, bytes] = {}

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The complete lines that came since the last time, with the name of their process."""
        for path in self._directory.glob("*.jsonl"):
            if path not in self._files:
                self._files[path], self._begun[path] = path.open("rb"), b""
            *lines, self._begun[path] = (self._begun[path] + self._files[path].read()).split(b"\n")
            for line in lines:
                yield path.stem, json.loads(line)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def histories(directory: Path) -> dict[str, list[Operation]]:
    """The whole history of each subject."""
    tail = Tail(directory)
    begun: dict[tuple[str, int], tuple[str, Operation]] = {}
    for process, line in tail:
        number = process, line["n"]
        if "do" in line:
            client = f"{process}/{line['client']}"
            operation = Operation(client, line["do"], line["token"], line["name"], line["at"] / 1e9)
            begun[number] = line["subject"], operation
        else:
            subject, operation = begun[number]
            begun[number] = (
                subject,
                operation._replace(end=line["at"] / 1e9, result=tuple(line["result"])),
            )
    tail.close()
    by_subject: dict[str, list[Operation]] = {}
    for subject, operation in begun.values():
        by_subject.setdefault(subject, []).append(operation)
    return by_subject


def unanswered(history: list[Operation]) -> int:
    return sum(operation.end == NEVER_RETURNED for operation in history)
