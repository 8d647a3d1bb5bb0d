# SPDX-License-Identifier: Apache-2.0
"""How the processes of all ranks meet in a folder, with every order in which they may come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_moetion.clock import SystemClock
from megatron_moetion.export.meeting import Meeting, MeetingFailed

RANKS = 4


def never() -> float:
    return 60.0


def meetings(folder: Path, ranks: int = RANKS) -> list[Meeting]:
    made = [Meeting(folder / ".draft", rank, ranks, SystemClock()) for rank in range(ranks)]
    for each in made:
        each.enter()
    return made


def together(*calls: Callable[[], object]) -> list[object]:
    """What each returns, or the error that it raises."""

    def settled(call: Callable[[], object]) -> object:
        try:
            return call()
        except MeetingFailed as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(settled, calls))


def test_rank_0_gets_all_parts_in_the_order_of_ranks(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    for rank in (3, 1, 0, 2):
        made[rank].add_part(b"part %d" % rank)
    assert made[0].parts(never) == [b"part 0", b"part 1", b"part 2", b"part 3"]
    (tmp_path / ".draft" / "__0_0.distcp").write_bytes(b"tensors")
    made[0].tidy()
    assert [p.name for p in (tmp_path / ".draft").iterdir()] == ["__0_0.distcp"]
    for each in made:
        each.leave()
        each.leave()


def test_a_rank_that_fails_ends_the_wait_with_its_reason(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    for rank in (0, 1, 3):
        made[rank].add_part(b"")
    found = together(lambda: made[0].parts(never), lambda: made[2].fail("no space left\non device"))
    assert found[0] == "rank 2: no space left\non device"


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    made = meetings(tmp_path, 12)
    made[0].add_part(b"")
    left = iter([1.0, 0.0])
    with pytest.raises(MeetingFailed, match=r"ranks 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. of 12 never wrote a part"):
        made[0].parts(lambda: next(left))


@pytest.mark.parametrize("stable", [(7, 7, 7, 7), (7, 8, 7, 6), (9, 7, 8, 8)])
def test_all_choose_the_newest_that_any_calls_stable(tmp_path: Path, stable: Sequence[int]) -> None:
    made = meetings(tmp_path)
    found = together(*(lambda m=m, s=s: m.choose(s, never) for m, s in zip(made, stable, strict=True)))  # type: ignore[misc]
    assert found == [max(stable)] * RANKS


@pytest.mark.parametrize("absent", [0, 2])
def test_where_one_rank_is_not_ending_nothing_is_chosen(tmp_path: Path, absent: int) -> None:
    made = [m for rank, m in enumerate(meetings(tmp_path)) if rank != absent]
    for each in made:
        left = iter([1.0, 1.0, 0.0])
        with pytest.raises(MeetingFailed, match="not all ranks"):
            each.choose(5, lambda left=left: next(left))  # type: ignore[misc]


def test_a_rank_that_has_ended_by_itself_keeps_nobody_waiting(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    found = together(
        *(lambda m=m: m.choose(5, never) for m in made[:3]),  # type: ignore[misc]
        lambda: made[3].fail("its rank has ended by itself"),
    )
    assert found[:3] == ["rank 3: its rank has ended by itself"] * 3


def test_a_folder_that_is_gone_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    (tmp_path / ".draft").rmdir()
    with pytest.raises(FileNotFoundError):
        made[1].add_part(b"")
    with pytest.raises(FileNotFoundError):
        made[0].parts(never)
