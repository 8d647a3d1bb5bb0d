# SPDX-License-Identifier: Apache-2.0
"""Files of a store that are gone: deleted by somebody, or given up by their owners."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from support import ToyState, make_arena, node_folder

from megatron_moetion.run.upkeep import Upkeep
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Newest


class GivenUp(OpenArenas):
    """Rank 1 gives its arena up as soon as somebody has been told that it is here."""

    def all(self) -> list[Arena]:
        found = super().all()
        given_up = self.take_out(1)
        if given_up is not None:
            given_up.remove()
        return found


class NotDrained:
    """A pipeline that nobody is to drain."""

    def drain(self) -> NoReturn:
        raise AssertionError("nothing was deleted")


def test_an_arena_that_its_owner_gives_up_at_this_moment_was_not_deleted(tmp_path: Path) -> None:
    state, node = ToyState(num_experts=2), node_folder(tmp_path)
    held = make_arena(tmp_path, state, 1)
    arenas = GivenUp(own=make_arena(tmp_path, state, 0), held={1: held}, retention=Newest())
    lock = node.lock(1.0, lambda _: None)
    unused: Any = None
    pipeline: Any = NotDrained()
    upkeep = Upkeep(
        node=node, lock=lock, arenas=arenas, packer=unused, pipeline=pipeline, journal=unused, rank=0, attempt=0
    )
    upkeep.check(1)
    assert not held.has_file
    assert arenas.all() == [arenas.own]
    arenas.close()
    lock.close()
