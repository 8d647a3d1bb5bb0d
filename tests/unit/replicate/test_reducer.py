# SPDX-License-Identifier: Apache-2.0
"""Trees over real sockets, broken and healed."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fabrics import Fabrics, Faults, eventually, loopback_fabric, loopback_fabrics
from support import together
from torch import distributed as dist

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Connection, Note, Reducer
from megatron_moetion.replicate.control import PURPOSE
from megatron_moetion.replicate.reducer import merge_notes, pack, unpack

PATHS = [str(Path(__file__).resolve().parents[n]) for n in (1, 3)]
"""Of what a process of its own imports."""
BEAT = {"heartbeat_s": 0.05}
"""A rank is silent after a quarter of a second."""


def add(mine: Sequence[int], theirs: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(mine, theirs, strict=True)]


def reducers(fabrics: Fabrics, name: str = "sum", members: Sequence[int] | None = None) -> list[Reducer]:
    members = range(len(fabrics)) if members is None else members
    return [fabrics[rank].reducer(name, members, add) for rank in members]


def contribute(reducers: Sequence[Reducer], number: int) -> None:
    for rank, reducer in enumerate(reducers):
        reducer.contribute(number, [1, 10**rank * number])


def check(reducers: Sequence[Reducer], numbers: Sequence[int]) -> None:
    """All members get the same right results of these rounds."""
    expected = [(n, (len(reducers), sum(10**rank * n for rank in range(len(reducers))))) for n in numbers]
    for reducer in reducers:
        assert reducer.wait(numbers[-1], 20.0)
        assert [(r.number, r.words) for r in reducer.results()] == expected


# -- what breaks in the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 10])
@pytest.mark.parametrize(("rank", "peer"), [(1, 0), (0, 1), (2, 1)])
def test_connections_that_are_reset_are_made_again_and_nothing_is_lost(rank: int, peer: int, times: int) -> None:
    faults = Faults()
    with loopback_fabrics(6, cuts=faults, **BEAT) as fabrics:
        trees = reducers(fabrics)
        contribute(trees, 0)
        check(trees, [0])
        faults.reset(times, rank=rank, peer=peer)
        for number in range(1, 30):
            contribute(trees, number)
        check(trees, range(1, 30))
    assert faults.met >= 1


@pytest.mark.parametrize("position", [-1, 0, 2, 5, 20])
def test_a_damaged_message_is_noticed_and_said_again(position: int) -> None:
    faults = Faults()
    with loopback_fabrics(3, cuts=faults) as fabrics:
        trees = reducers(fabrics)
        contribute(trees, 0)
        check(trees, [0])
        faults.flip(3, purpose="control", position=position)
        for number in range(1, 20):
            contribute(trees, number)
        check(trees, range(1, 20))
        assert faults.met == 3


def test_a_rank_cut_off_is_named_to_all_and_delays_results_until_it_is_back() -> None:
    faults = Faults()
    with loopback_fabrics(6, cuts=faults, **BEAT) as fabrics:
        trees = reducers(fabrics)
        contribute(trees, 0)
        check(trees, [0])
        assert all(f.silent() == {} for f in fabrics)
        with faults.cut([2]):
            contribute(trees, 1)
            eventually(lambda: all(set(f.silent()) == {2} for f in fabrics if f.rank != 2))
            eventually(lambda: set(fabrics[2].silent()) == {1})  # its parent: it hears of nobody else
            assert fabrics[0].silent()[2] >= 0.2
            assert all(tree.results() == [] for tree in trees)
        check(trees, [1])
        eventually(lambda: all(f.silent() == {} for f in fabrics))


def test_a_parent_cut_off_is_named_by_those_below_it_and_the_root() -> None:
    faults = Faults()
    with loopback_fabrics(6, cuts=faults, **BEAT) as fabrics:
        trees = reducers(fabrics)
        contribute(trees, 0)
        check(trees, [0])
        with faults.cut([1]):
            contribute(trees, 1)
            eventually(lambda: all(set(f.silent()) == {1} for f in fabrics if f.rank != 1))
        check(trees, [1])


def test_a_child_is_silent_from_the_start() -> None:
    store = dist.HashStore()
    fabrics = Fabrics(loopback_fabric(store, rank, 3, **BEAT) for rank in range(2))
    with fabrics:
        eventually(lambda: [set(f.silent()) for f in fabrics] == [{2}, {2}])
        fabrics.append(loopback_fabric(store, 2, 3, **BEAT))
        eventually(lambda: [f.silent() for f in fabrics] == [{}, {}, {}])


def test_a_group_does_not_wait_for_those_outside() -> None:
    faults = Faults()
    with loopback_fabrics(6, cuts=faults, ranks_per_host=2) as fabrics:
        groups = [reducers(fabrics, "experts", members) for members in ((0, 2, 4), (1, 3, 5))]
        with faults.cut([0]):
            contribute(groups[1], 0)
            check(groups[1], [0])
            contribute(groups[0], 0)
            assert groups[0][0].results() == []
        check(groups[0], [0])


def test_a_member_may_join_when_the_others_are_rounds_ahead() -> None:
    with loopback_fabrics(3) as fabrics:
        early = [fabrics[rank].reducer("sum", range(3), add) for rank in (1, 2)]
        for number in range(5):
            for reducer, rank in zip(early, (1, 2), strict=True):
                reducer.contribute(number, [1, 10**rank * number])
        trees = [fabrics[0].reducer("sum", range(3), add), *early]
        for number in range(5):
            trees[0].contribute(number, [1, number])
        check(trees, range(5))


def test_rounds_that_one_rank_cannot_keep_are_given_up_by_all(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    with loopback_fabrics(3, cuts=faults) as fabrics:
        trees = reducers(fabrics)
        with faults.cut([2]):
            for number in range(70):
                contribute(trees, number)
        check(trees, range(6, 70))
    said = [r.getMessage() for r in caplog.records]
    assert sorted(text[: text.index(".")] for text in said) == [
        f"[moetion] rank {rank}: 64 rounds without a result; older ones are given up" for rank in range(3)
    ]


def test_a_combination_that_fails_ends_this_tree_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def fail(mine: Sequence[int], theirs: Sequence[int]) -> list[int]:
        raise AssertionError("a bug")

    with loopback_fabrics(2) as fabrics:
        broken = [f.reducer("broken", (0, 1), fail) for f in fabrics]
        for reducer in broken:
            reducer.contribute(0, [1])
        eventually(lambda: "cannot combine" in caplog.text)
        assert not broken[0].wait(0, 0.1)
        trees = reducers(fabrics)
        contribute(trees, 0)
        check(trees, [0])


class Buggy(Faults):
    """Raises what nobody expects, a few times."""

    bugs = 0

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        if self.bugs and parts:
            self.bugs -= 1
            raise ZeroDivisionError
        return parts


def test_a_bug_in_the_control_plane_is_said_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    cuts = Buggy()
    with loopback_fabrics(2, cuts=cuts, **BEAT) as fabrics:
        trees = reducers(fabrics)
        cuts.bugs = 5
        eventually(lambda: not cuts.bugs)
        contribute(trees, 0)
        check(trees, [0])
    assert 1 <= caplog.text.count("the control plane begins anew") <= 2


# -- collective calls ----------------------------------------------------------------------------------------


def test_a_call_that_timed_out_names_the_missing_and_the_next_one_works() -> None:
    with loopback_fabrics(3, timeout_s=0.3) as fabrics:
        for _ in range(2):
            with pytest.raises(ChannelError, match=r"a rank was lost .* no word from rank\(s\) \[2\], .* within 0.3 s"):
                together(*(lambda f=f: f.gather(f.rank) for f in fabrics[:2]))
        for _ in range(2):  # its first two calls belong to the first two of the others
            assert fabrics[2].gather(2) == [0, 1, 2]
        assert together(*(lambda f=f: f.gather(f.rank) for f in fabrics)) == [[0, 1, 2]] * 3


def test_a_call_names_the_silent_rank_and_not_the_one_that_it_speaks_through() -> None:
    store = dist.HashStore()
    with Fabrics(loopback_fabric(store, rank, 3, arity=1, timeout_s=1.0, **BEAT) for rank in range(2)) as fabrics:
        for fabric in fabrics:
            eventually(lambda f=fabric: set(f.silent()) == {2})
        with pytest.raises(ChannelError, match=r"rank\(s\) \[2\] have been silent"):
            together(*(lambda f=f: f.gather(f.rank) for f in fabrics))


def test_a_rank_too_many_calls_behind_is_told_so() -> None:
    with loopback_fabrics(2, timeout_s=0.1) as fabrics:
        for _ in range(6):
            with pytest.raises(ChannelError, match=r"no word from rank\(s\) \[0\]"):
                fabrics[1].gather(1)
        with pytest.raises(ChannelError):
            fabrics[0].gather(0)


def test_different_calls_at_once_are_an_error() -> None:
    calls: list[Callable[[Fabrics], object]] = [
        lambda fabrics: fabrics[0].gather(1),
        lambda fabrics: fabrics[1].reduce(1, lambda a, b: a),
    ]
    with loopback_fabrics(2, timeout_s=0.5) as fabrics, pytest.raises(ChannelError, match="collective"):
        together(*(lambda c=c: c(fabrics) for c in calls))


def test_a_reset_in_the_middle_of_a_call_goes_unnoticed() -> None:
    faults = Faults()
    with loopback_fabrics(6, cuts=faults) as fabrics:
        for turn in range(20):
            faults.reset(1, rank=turn % 6)
            documents = together(*(lambda f=f, t=turn: f.gather([t, f.rank]) for f in fabrics))
            assert documents == [[[turn, rank] for rank in range(6)]] * 6
            total = together(*(lambda f=f: f.reduce([f.rank], lambda a, b: a + b) for f in fabrics))
            assert total == [list(range(6))] * 6


def test_what_a_rank_said_last_arrives_although_it_closes_at_once() -> None:
    with loopback_fabrics(4) as fabrics:

        def last_word(rank: int) -> list[int]:
            found = fabrics[rank].gather(rank)
            fabrics[rank].close()
            return found

        assert together(*(lambda r=r: last_word(r) for r in range(4))) == [list(range(4))] * 4


_LAST = """
import os, sys
sys.path[:0] = {paths!r}
from torch import distributed as dist
from fabrics import loopback_fabric
fabric = loopback_fabric(dist.FileStore({store!r}, 2), 0, 2)
fabric.gather("here")
sys.stdin.readline()
found = fabric.gather("last")
os._exit(0)
"""


@pytest.mark.dist
def test_a_process_may_end_as_soon_as_it_has_a_result_and_the_others_get_it_too(tmp_path: Path) -> None:
    for turn in range(5):
        store = str(tmp_path / f"store{turn}")
        program = _LAST.format(paths=PATHS, store=store)
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True) as root:
            fabric = loopback_fabric(dist.FileStore(store, 2), 1, 2)
            assert fabric.gather("here") == ["here", "here"]
            answer = ThreadPoolExecutor(1).submit(fabric.gather, "last")  # it waits for the root
            time.sleep(0.1)
            root.communicate("now\n")
            assert answer.result(20) == ["last", "last"]
            fabric.close()


def test_nobody_waits_for_a_fabric_that_is_abandoned() -> None:
    with loopback_fabrics(2, timeout_s=60) as fabrics, pytest.raises(ChannelError):
        together(lambda: fabrics[0].gather(0), fabrics[0].abandon)


# -- a process that is stopped -------------------------------------------------------------------------------

_CHILD = """
import sys
sys.path[:0] = {paths!r}
from torch import distributed as dist
from fabrics import loopback_fabric
store = dist.FileStore({store!r}, 3)
fabric = loopback_fabric(store, 2, 3, heartbeat_s=0.1)
tree = fabric.reducer("sum", range(3), lambda a, b: [x + y for x, y in zip(a, b)])
print("here", flush=True)
for number, _ in enumerate(sys.stdin):
    tree.contribute(number, [1, 100 * number])
    if not tree.wait(number, 60):
        sys.exit("no result")
fabric.close()
"""


@pytest.mark.dist
def test_a_stopped_process_is_named_and_goes_on(tmp_path: Path) -> None:
    program = _CHILD.format(paths=PATHS, store=str(tmp_path / "store"))
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        store = dist.FileStore(str(tmp_path / "store"), 3)
        with Fabrics(loopback_fabric(store, rank, 3, heartbeat_s=0.1) for rank in range(2)) as fabrics:
            trees = [f.reducer("sum", range(3), add) for f in fabrics]
            assert child.stdout.readline() == "here\n"
            for number, is_stopped in enumerate((False, True, False)):
                child.stdin.write("\n")
                if is_stopped:
                    child.send_signal(signal.SIGSTOP)
                for rank, tree in enumerate(trees):
                    tree.contribute(number, [1, 10**rank * number])
                if is_stopped:
                    eventually(lambda: all(fabric.silent().get(2, 0.0) > 3.0 for fabric in fabrics))
                    child.send_signal(signal.SIGCONT)
                assert all(tree.wait(number, 20.0) for tree in trees)
            found = [[(r.number, r.words) for r in tree.results()] for tree in trees]
            assert found == [[(n, (3, 111 * n)) for n in range(3)]] * 2
            eventually(lambda: all(f.silent() == {} for f in fabrics))
            child.stdin.close()
            assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()


# -- the words -----------------------------------------------------------------------------------------------


def test_notes_of_many_ranks_become_one_of_the_lowest() -> None:
    def note(rank: int, ranks: int = 1) -> Note:
        return Note(ranks=ranks, rank=rank, iteration=rank, text=f"of {rank}")

    merged = merge_notes({"a": note(5), "b": note(5)}, {"a": note(3, ranks=4), "c": note(3)})
    assert merged == {"a": note(3, ranks=5), "b": note(5), "c": note(3)}
    many = {str(kind): note(1) for kind in range(100)}
    assert len(merge_notes(many, {"another": note(0)})) == 100
    assert len(merge_notes({}, many)) == 32


def test_words_and_notes_survive_the_wire() -> None:
    notes = {"drop": Note(ranks=3, rank=1, iteration=7, text="é" * 1000)}
    words = (0, -1, (1 << 63) - 1, -(1 << 63))
    found_words, found_notes = unpack(pack(words, notes))
    assert found_words == words
    assert found_notes == {"drop": Note(ranks=3, rank=1, iteration=7, text="é" * 400)}
    assert unpack(pack((), {})) == ((), {})


def read_to_the_end(connection: Connection) -> None:
    while True:
        connection.receive([np.zeros(1, dtype=np.uint8)], 5.0)


@pytest.mark.parametrize("body", [b"", b"abc", bytes(25) + b"x", None])
def test_a_frame_that_cannot_be_one_ends_its_connection_and_no_other(
    body: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Too short, no heartbeat although it says so, and four gigabytes that are announced: with valid checksums."""
    length = 4 << 30 if body is None else len(body)
    length -= body is None
    head = struct.pack("<III", length, zlib.crc32(struct.pack("<I", length)), zlib.crc32(body or b""))
    with loopback_fabrics(3, heartbeat_s=0.05) as fabrics:
        together(*(lambda f=f: f.gather(0) for f in fabrics))  # type: ignore[misc]
        stray = fabrics[0].mesh.dial(2, PURPOSE, 5.0)
        stray.send([np.frombuffer(head + (body or b"x" * 100), dtype=np.uint8)])
        with pytest.raises(ChannelError):
            read_to_the_end(stray)
        assert together(*(lambda f=f: f.gather(f.rank) for f in fabrics)) == [[0, 1, 2]] * 3  # type: ignore[misc]
    assert "begins anew" not in caplog.text
