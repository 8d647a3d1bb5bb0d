# SPDX-License-Identifier: Apache-2.0
"""How the processes of all ranks meet in a folder, with every order in which they may come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_moetion.clock import SystemClock
from megatron_moetion.export.meeting import NOTHING, Meeting, MeetingFailed

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
        made[rank].add_part(5, b"part %d" % rank)
    assert made[0].parts(5, never) == [b"part 0", b"part 1", b"part 2", b"part 3"]
    (tmp_path / ".draft" / "__0_0.distcp").write_bytes(b"tensors")
    made[0].tidy()
    assert [p.name for p in (tmp_path / ".draft").iterdir()] == ["__0_0.distcp"]
    for each in made:
        each.leave()
        each.leave()


def test_a_rank_that_fails_ends_the_wait_with_its_reason(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    for rank in (0, 1, 3):
        made[rank].add_part(5, b"")
    found = together(lambda: made[0].parts(5, never), lambda: made[2].fail("no space left\non device"))
    assert found[0] == "rank 2: no space left\non device"


def test_ranks_that_have_waited_long_enough_are_not_the_ones_that_are_missing(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    for rank in (0, 1, 3):
        made[rank].add_part(5, b"")
    made[1].fail("rank 0's process has not put the parts together")
    with pytest.raises(MeetingFailed, match="rank 2 of 4 never wrote a part"):
        made[0].parts(5, never)
    made[2].fail("no space left")
    with pytest.raises(MeetingFailed, match="rank 2: no space left"):
        made[0].parts(5, never)


def test_a_part_may_be_used_until_rank_0_gives_it_up(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    assert not made[1].may_use_part
    made[1].add_part(5, b"")
    made[1].fail("it has waited long enough")
    assert made[1].may_use_part
    made[0].fail("no space left")
    assert not made[1].may_use_part


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    made = meetings(tmp_path, 12)
    made[0].add_part(5, b"")
    left = iter([1.0, 0.0])
    with pytest.raises(MeetingFailed, match=r"ranks 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. of 12 never wrote a part"):
        made[0].parts(5, lambda: next(left))


@pytest.mark.parametrize("stable", [(7, 7, 7, 7), (7, 8, 7, 6), (9, 7, 8, 8)])
def test_all_choose_the_newest_that_any_calls_stable(tmp_path: Path, stable: Sequence[int]) -> None:
    made = meetings(tmp_path)
    found = together(*(lambda m=m, s=s: m.choose(s, 3, never) for m, s in zip(made, stable, strict=True)))  # type: ignore[misc]
    assert found == [max(stable)] * RANKS


@pytest.mark.parametrize("absent", [0, 2])
def test_where_one_rank_is_not_ending_nothing_is_chosen(tmp_path: Path, absent: int) -> None:
    made = [m for rank, m in enumerate(meetings(tmp_path)) if rank != absent]
    for each in made:
        left = iter([1.0, 1.0, 0.0])
        with pytest.raises(MeetingFailed, match="not all ranks"):
            each.choose(5, 3, lambda left=left: next(left))  # type: ignore[misc]


def given_up(meeting: Meeting) -> None:
    """As the writer does it: what has gone wrong for rank 0 is said to all."""
    try:
        meeting.choose(5, 3, never)
    except MeetingFailed as error:
        meeting.fail(str(error))
        meeting.clear()
        raise


def test_a_rank_that_has_ended_by_itself_keeps_nobody_waiting(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    found = together(
        *(lambda m=m: given_up(m) for m in made[:3]),  # type: ignore[misc]
        lambda: made[3].fail("its rank has ended by itself"),
    )
    assert found[0] == "rank 3: its rank has ended by itself"
    assert found[1:3] == ["rank 0: rank 3: its rank has ended by itself"] * 2


def test_what_is_on_disk_already_is_not_written_again_and_rank_0_decides(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    found = together(*(lambda m=m, w=w: m.choose(7, w, never) for m, w in zip(made, (7, 3, 3, 9), strict=True)))  # type: ignore[misc]
    assert found == [NOTHING] * RANKS


def test_who_comes_after_rank_0_has_given_up_writes_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    (tmp_path / ".draft" / "__0_0.distcp").write_bytes(b"half")
    made[0].fail("no room")
    made[0].clear()
    made[0].clear()
    assert [p.name for p in (tmp_path / ".draft").iterdir()] == ["moetion-failed-00000"]
    for each in (made[1].require_rank_0, lambda: made[2].wait_for_rank_0(never), lambda: made[3].choose(5, 3, never)):
        with pytest.raises(MeetingFailed, match="rank 0: no room"):
            each()


def test_a_failure_is_said_also_where_there_is_no_room_for_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = meetings(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    made[2].fail("a long story")
    with pytest.raises(MeetingFailed, match="rank 2: "):
        made[0].parts(5, never)


def test_parts_of_another_iteration_do_not_count(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    for each in made:
        each.add_part(4, b"old")
    left = iter([1.0, 0.0])
    with pytest.raises(MeetingFailed, match="ranks 0, 1, 2, 3 of 4 never wrote a part"):
        made[0].parts(5, lambda: next(left))


def test_a_folder_that_is_gone_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    made = meetings(tmp_path)
    (tmp_path / ".draft").rmdir()
    with pytest.raises(FileNotFoundError):
        made[1].add_part(5, b"")
    with pytest.raises(FileNotFoundError):
        made[0].parts(5, never)
