# SPDX-License-Identifier: Apache-2.0
"""What parents and standbys tell each other, generation after generation, over one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed as dist

from megatron_moetion.warm import board as board_module
from megatron_moetion.warm.board import AGAIN, ALL, ENDED, LEAVE, LEFT, SHORT, TAKEN, Board, follow


@pytest.fixture
def board_of() -> Callable[[int], Board]:
    """Of a launch of four ranks on two machines."""
    store = dist.HashStore()
    return lambda generation: Board(store, "0-x", generation, world_size=4, num_places=2)


def taking(name: str, answer_s: float = 0.1) -> Callable[[Board], str]:
    def take(board: Board) -> str:
        taken = board.take_a_lost_place(name, answer_s)
        return "" if taken is None else f"{TAKEN} {taken}"

    return take


def meet(board: Board, parents: int) -> list[str]:
    with ThreadPoolExecutor(parents) as pool:
        return list(pool.map(lambda _: board.meet(5), range(parents)))


def test_a_place_that_nobody_keeps_is_taken_once(board_of: Callable[[int], Board]) -> None:
    board = board_of(0)
    board.tell(f"{AGAIN} rank 0 has ended")
    assert [board.keep(0), board.keep(0)] == [True, True]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda name: board.take_a_lost_place(name, 0.1), ["a", "b"]))
    assert sorted(found, key=str) == [1, None]
    assert not board.keep(1), "whoever comes late has lost it"
    assert board.keep(0)


def test_a_machine_that_answers_while_a_standby_waits_keeps_its_place(
    board_of: Callable[[int], Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(0)
    board.tell(AGAIN)
    board.keep(0)
    kept: list[bool] = []
    monkeypatch.setattr(board_module.time, "sleep", lambda seconds: kept.append(board.keep(1)))
    assert board.take_a_lost_place("a", 0.5) is None
    assert kept == [True]


def test_a_standby_follows_through_restarts_that_need_it_not(
    board_of: Callable[[int], Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes late: of the first generation all is over, and nothing of that is waited for."""
    for generation in (0, 1):
        board_of(generation).tell(AGAIN)
        assert [board_of(generation).keep(place) for place in (0, 1)] == [True, True]
        assert meet(board_of(generation), 4) == [ALL] * 4
    board_of(2).tell(AGAIN)
    board_of(2).keep(1)
    slept: list[float] = []
    monkeypatch.setattr(board_module.time, "sleep", slept.append)
    assert follow(board_of, 0, taking("a", answer_s=0.1), meet_s=5) == f"2 {TAKEN} 0"
    assert slept == [0.1], "the answer to the last generation"


@pytest.mark.parametrize(("event", "word"), [(ENDED, ENDED), (f"{LEAVE} why", SHORT), (LEFT, SHORT)])
def test_a_launch_that_is_over_is_followed_no_further(board_of: Callable[[int], Board], event: str, word: str) -> None:
    board_of(0).tell(event)
    assert follow(board_of, 0, taking("a"), meet_s=5) == f"0 {word}"


def test_a_meeting_that_somebody_has_not_come_to_ends_the_launch_for_standbys_too(
    board_of: Callable[[int], Board],
) -> None:
    board = board_of(0)
    board.tell(AGAIN)
    assert board.keep(0)
    assert board.keep(1)
    assert board.meet(0.1) == SHORT
    assert follow(board_of, 0, taking("a"), meet_s=5) == f"0 {SHORT}"
    assert board.take_a_lost_place("late", 0.0) is None


def test_who_hears_nothing_says_where_it_was(board_of: Callable[[int], Board]) -> None:
    board_of(0).tell(AGAIN)
    assert board_of(0).keep(0)
    assert board_of(0).keep(1)
    assert meet(board_of(0), 4) == [ALL] * 4
    assert follow(board_of, 0, taking("a"), meet_s=5, look_s=0.2) == "1"


def test_a_rank_that_says_its_end_again_counts_once(board_of: Callable[[int], Board]) -> None:
    """Whoever did not hear an answer says it again; so does the last one, whose word for all may have been lost."""
    board = board_of(0)
    for rank in range(3):
        for attempt in range(2):
            board.tell_ended(rank, attempt)
    assert not board.has_event()
    board.tell_ended(3, 0)
    assert board.await_event(1) == ENDED


def test_the_last_rank_says_the_end_of_all_again(
    board_of: Callable[[int], Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(0)
    for rank in range(3):
        board.tell_ended(rank, 0)
    with monkeypatch.context() as lost:
        lost.setattr(Board, "tell", lambda self, event: "")
        board.tell_ended(3, 0)
    assert not board.has_event()
    board.tell_ended(3, 1)
    assert board.await_event(1) == ENDED
