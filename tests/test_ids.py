"""Ids: 16 hexadecimal digits below 2**63, in the order of their creation."""

from __future__ import annotations

import threading

import pytest

from vtoken.ids import IdSequence

NOW = 1_790_000_000_000


def test_the_form() -> None:
    made = IdSequence().next(NOW)
    assert len(made) == 16
    assert set(made) <= set("0123456789abcdef")
    assert int(made, 16) >> 21 == NOW


def test_they_sort_by_their_creation_within_a_millisecond_and_across_them() -> None:
    sequence = IdSequence()
    made = [sequence.next(NOW + n // 3000) for n in range(9000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_a_clock_that_jumps_back_does_not_turn_the_order() -> None:
    sequence = IdSequence()
    made = [sequence.next(now) for now in (NOW, NOW - 10**9, 0, -5, NOW - 1)]
    assert made == sorted(made)


@pytest.mark.parametrize("now", [-(10**15), -1, 0, 2**42 - 1, 2**42, 253_402_300_799_999, 2**63 - 1])
def test_any_moment_gives_different_ids_below_2_to_the_63(now: int) -> None:
    sequence = IdSequence()
    made = {sequence.next(now) for _ in range(1000)}
    assert len(made) > 990  # after 2109 they are drawn by chance: 2**21 values
    assert all(len(each) == 16 and int(each, 16) < 2**63 for each in made)


def test_two_sequences_rarely_meet() -> None:
    one, other = ({sequence.next(NOW + n) for n in range(2000)} for sequence in (IdSequence(), IdSequence()))
    assert len(one & other) < 20  # one in a million pairs is expected


def test_threads_share_one() -> None:
    sequence = IdSequence()
    made: list[str] = []

    def draw() -> None:
        made.extend([sequence.next(NOW) for _ in range(2000)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8000
