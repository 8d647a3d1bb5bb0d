# SPDX-License-Identifier: Apache-2.0
"""One snapshot: what is committed, what is left out, and what becomes of its slots."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from support import CHUNK_BYTES, POOL, ToyState, make_arena, no_probe

from megatron_moetion.arrays import Digests
from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import DeviceFault
from megatron_moetion.schedule.pace import EvenPace
from megatron_moetion.snapshot.capture import Captured, Capturer, Contents
from megatron_moetion.snapshot.device import Pace
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.store.arena import Arena

DENSE, FIRST, SECOND, HOST = range(4)


class Late(Packer):
    """A packer that is cancelled, or fails, while it reads live state (``live``) or copies (``copies``)."""

    live: Callable[[], bool] = staticmethod(lambda: False)
    copies: Callable[[], bool] = staticmethod(lambda: False)

    def pack(
        self,
        targets: Targets,
        between: Callable[[], None],
        on_enqueued: Callable[[], None] | None = None,
        pace: Pace | None = None,
    ) -> Digests | None:
        if self.live() if on_enqueued is not None else self.copies():
            return None
        return super().pack(targets, between, on_enqueued, pace)


class Rig:
    def __init__(self, folder: Path, copies: int = 3) -> None:
        self.state = state = ToyState(num_experts=2)  # captures read its memory
        self.arena: Arena = make_arena(folder, state, copies=copies)
        self.packer = Late(state.inventory(), CHUNK_BYTES, POOL, None)
        self.reads = 0
        self.capturer = Capturer(
            packer=self.packer,
            arena=self.arena,
            epoch=3,
            probe=no_probe,
            packed=lambda *_: None,
            pace=EvenPace(SystemClock(), threading.Event()),
            clock=SystemClock(),
        )
        self.packer.freeze(b"host")

    def capture(self, iteration: int, contents: Contents) -> Captured:
        def live_is_read() -> None:
            self.reads += 1

        return self.capturer.capture(iteration, contents, live_is_read)

    def listed(self) -> set[tuple[int, int]]:
        return set(self.arena.page.records.keys)

    def free(self) -> bool:
        """Whether a full snapshot still finds room."""
        return not self.capture(99, Contents(units=(DENSE, FIRST, SECOND, HOST))).dropped


def test_all_that_was_asked_for_is_committed_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    found = rig.capture(7, Contents(staged=(HOST,), optional=(DENSE, FIRST), zero=(SECOND,), tokens={FIRST: 5}))
    assert (found.dropped, found.left_out, found.is_there) == (None, None, True)
    assert rig.listed() == {(u, 7) for u in (DENSE, FIRST, SECOND, HOST)}
    assert {r.unit: r.tokens for r in rig.arena.page.records} == {DENSE: 0, FIRST: 5, SECOND: 0, HOST: 0}
    assert {r.unit for r in rig.arena.page.records if r.is_zero} == {SECOND}
    assert {r.epoch for r in rig.arena.page.records} == {3}
    assert rig.reads >= 1


def test_live_state_that_is_read_too_late_is_left_out_where_it_is_optional(tmp_path: Path) -> None:
    rig = Rig(tmp_path, copies=1)
    rig.packer.live = lambda: True  # type: ignore[method-assign]
    found = rig.capture(7, Contents(staged=(HOST,), optional=(DENSE, FIRST)))
    assert (found.dropped, found.left_out, found.is_there) == (None, "late", True)
    assert rig.listed() == {(HOST, 7)}
    rig.packer.live = lambda: False  # type: ignore[method-assign]
    rig.arena.edit(lambda page: {"records": ()})
    assert rig.free()


def test_a_snapshot_without_optional_captures_is_complete_however_late(tmp_path: Path) -> None:
    """What turns depend on: nothing was asked for that is missing."""
    rig = Rig(tmp_path)
    rig.packer.live = lambda: True  # type: ignore[method-assign]
    found = rig.capture(7, Contents(staged=(HOST,)))
    assert (found.dropped, found.left_out, found.is_there) == (None, None, True)


@pytest.mark.parametrize("when", ["live", "copies"])
def test_what_cannot_be_left_out_drops_the_snapshot_and_gives_its_slots_back(tmp_path: Path, when: str) -> None:
    rig = Rig(tmp_path, copies=1)
    setattr(rig.packer, when, lambda: True)
    wanted = Contents(units=(DENSE, HOST)) if when == "live" else Contents(staged=(HOST,), optional=(DENSE,))
    assert rig.capture(7, wanted).dropped == "late"
    setattr(rig.packer, when, lambda: False)
    assert rig.listed() == set()
    assert rig.free()


@pytest.mark.parametrize("when", ["live", "copies"])
def test_a_device_that_fails_drops_the_snapshot_and_says_why(tmp_path: Path, when: str) -> None:
    def fail() -> NoReturn:
        raise DeviceFault("an illegal address")

    rig = Rig(tmp_path, copies=1)
    setattr(rig.packer, when, fail)
    found = rig.capture(7, Contents(staged=(HOST,), optional=(DENSE,)))
    assert (found.dropped, found.details) == ("device", "an illegal address")
    setattr(rig.packer, when, lambda: False)
    assert rig.free()


def test_room_for_what_is_needed_comes_before_room_for_what_is_optional(tmp_path: Path) -> None:
    rig = Rig(tmp_path, copies=1)
    assert rig.capture(1, Contents(units=(DENSE,))).is_there
    found = rig.capture(2, Contents(staged=(HOST,), optional=(DENSE, FIRST)))
    assert (found.dropped, found.left_out) == (None, "no-slot")
    assert rig.listed() == {(DENSE, 1), (HOST, 2)}
    assert rig.capture(3, Contents(staged=(HOST,))).dropped == "no-slot"
    assert rig.capture(4, Contents(units=(FIRST,))).is_there, "nothing was kept of those that found no room"
