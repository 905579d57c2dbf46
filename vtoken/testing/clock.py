"""A clock for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class Clock:
    """A clock for tests: it stands still until it is moved.

    Pass it to a manager as ``clock``. Moving it back is allowed.

    Args:
        start: an aware datetime.
    """

    def __init__(self, start: datetime = datetime(2100, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            raise ValueError("start must be an aware datetime")
        self._now = start

    def __call__(self) -> datetime:
        """The time it shows, aware and in UTC."""
        return self._now.astimezone(UTC)

    def advance(self, by: timedelta) -> None:
        """Move by that much; a negative timedelta moves it back."""
        self._now += by

    def set(self, to: datetime) -> None:
        """Move to an aware datetime."""
        if to.tzinfo is None:
            raise ValueError("to must be an aware datetime")
        self._now = to

    @property
    def milliseconds(self) -> int:
        """The time it shows, in whole milliseconds since 1970-01-01 UTC."""
        return (self._now - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
