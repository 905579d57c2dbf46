"""Rows of the SQLite backend are read by name, though their values come in an order."""

from __future__ import annotations

from inspect import signature

from vtoken_backends.sqlite import records


def test_the_values_of_a_row_and_of_a_key_are_read_in_the_order_in_which_they_are_stored() -> None:
    assert tuple(signature(records._token).parameters) == tuple(records.COLUMNS)
    assert tuple(signature(records._key).parameters) == ("digest", *records.KEY_ENTRY)
