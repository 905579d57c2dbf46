"""Rows of the SQLite backend are read by name, though their values come in an order."""

# pyright: reportPrivateUsage=false
# How a row is read can be seen from within only.

from __future__ import annotations

from inspect import signature

from vtoken_backends.sqlite import records


def test_the_values_of_a_row_and_of_a_key_are_read_in_the_order_in_which_they_are_stored() -> None:
    assert tuple(signature(records._token).parameters) == tuple(records.COLUMNS)
    read = tuple(signature(records._key).parameters)
    assert read[-len(records.KEY_ENTRY) :] == records.KEY_ENTRY
    assert read[-len(records.KEY_ENTRY) - 1] == "digest"
