"""Which process this is, known without a system call: every request asks, to find out that it was forked."""

from __future__ import annotations

import os

pid: int = os.getpid()
"""The id of this process."""


def _note_pid() -> None:
    global pid
    pid = os.getpid()


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_note_pid)
