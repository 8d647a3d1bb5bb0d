# SPDX-License-Identifier: Apache-2.0
"""Arenas that come and go while a rank trains; only its own one decides what it keeps."""

from __future__ import annotations

from pathlib import Path

from support import ToyState, capture, make_arena, make_packer

from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Newest, Settled


def test_only_the_own_arena_releases_and_others_come_and_go(tmp_path: Path) -> None:
    state = ToyState(num_experts=2)
    own, held = make_arena(tmp_path, state, 0), make_arena(tmp_path, state, 1)
    arenas = OpenArenas(own=own, held={}, retention=Newest())
    assert arenas.all() == [own]
    arenas.add(held)
    assert arenas.held == {1: held}
    packer = make_packer(state.inventory())
    for arena in arenas.all():
        for iteration in (1, 2):
            capture(packer, arena, iteration)
    arenas.release(Settled(stable=2))
    assert {r.iteration for r in own.page.records} == {2}
    assert own.page.stable == 2
    assert {r.iteration for r in held.page.records} == {1, 2}
    assert arenas.take_out(1) is held
    assert arenas.take_out(1) is None
    assert arenas.all() == [own]
    arenas.close()
    held.close()
