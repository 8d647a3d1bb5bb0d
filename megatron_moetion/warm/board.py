# SPDX-License-Identifier: Apache-2.0
"""What the parents of one launch tell each other, through the launcher's store. Calls may block."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress

from torch import distributed as dist

from megatron_moetion.errors import ChannelError, HungPeer, ProtectionLost
from megatron_moetion.rendezvous import has_come

_LONGEST_S = 2_000_000.0
"""The longest wait that torch's store takes, with a few days to spare; it writes two lines when it runs out."""
LOOK_S = 300.0
"""Who has no rank asks so often whether the store is still there."""
FOLLOW_S = 240.0
"""More than the end of a generation takes: ranks are killed, and their parents meet."""
ENDED, AGAIN, LEAVE, LEFT = "ended", "again", "leave", "left"
TAKEN = "taken"
"""In place of an event: another machine has this one's place."""
LOST = "lost"
"""In place of an event: the store does not answer."""
ALL, SHORT, DONE = "all", "short", "done"
_OWN = "own"
_AGAIN_CODES = frozenset({ChannelError.exit_code, ProtectionLost.exit_code, HungPeer.exit_code})
"""Of errors that a peer's death causes too (1 is a traceback's as well), and of what a new process mends."""


def verdict(code: int, *, restarts_left: int) -> str:
    """What the end of a rank means for the job: ``ENDED``, ``AGAIN`` or ``LEAVE``; ``code`` is negative for a signal.

    A code that a program ends with on purpose is for the launcher.
    """
    if code == 0:
        return ENDED
    is_fault = code < 0 or code in _AGAIN_CODES
    return AGAIN if is_fault and restarts_left > 0 else LEAVE


def exit_code_of(code: int) -> int:
    """What a parent ends with for a rank that has ended so; a shell's number for a signal."""
    return 128 - code if code < 0 else code


def how(code: int) -> str:
    """The end of a rank, in words."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


class Board:
    """One generation of ranks. ``num_places``: machines, each with as many consecutive ranks."""

    def __init__(self, store: dist.Store, token: str, generation: int, world_size: int, num_places: int) -> None:
        self._store = dist.PrefixStore(f"moetion/warm/{token}/{generation}", store)
        self._world_size = world_size
        self._num_places = num_places

    def tell(self, event: str) -> str:
        """What has happened to this generation; the first word counts."""
        self._store.compare_set("event", "", event)
        return DONE

    def tell_ended(self, rank: int, attempt: int) -> str:
        """This rank has done all its work. The last one says it for all.

        It may be said again, by another ``attempt``, where nobody knows whether it was heard: a rank counts once.
        """
        if self._store.compare_set(f"ended/{rank}", "", str(attempt)).decode() == str(attempt):
            self._store.add("ended", 1)
        if self._store.add("ended", 0) == self._world_size:
            self.tell(ENDED)
        return DONE

    def await_event(self, limit_s: float = _LONGEST_S) -> str:
        """The word that counts; empty where none comes within the limit."""
        return self._wait("event", limit_s) or ""

    def has_event(self) -> bool:
        """Whether something has happened to this generation."""
        return self._store.check(["event"])

    def keep(self, place: int) -> bool:
        """This machine is there, and so are its parents; False: another one has its place."""
        return self._store.compare_set(f"place/{place}", "", _OWN).decode() == _OWN

    def take_a_lost_place(self, name: str, answer_s: float) -> int | None:
        """The place of a machine of which nobody has said within ``answer_s`` that it is there; None: there is none.

        ``name`` is that of no other machine. Whose place was taken does not get it back, however late it is.
        """
        if self._store.check(["meeting"]):
            return None
        time.sleep(answer_s)
        for place in range(self._num_places):
            key = f"place/{place}"
            if not self._store.check([key]) and self._store.compare_set(key, "", name).decode() == name:
                return place
        return None

    def meet(self, limit_s: float) -> str:
        """``ALL`` once all parents have come here, each after its rank had ended; ``SHORT`` where one does not come.

        It is one answer for all of them.
        """
        if self._store.add("met", 1) == self._world_size:
            self._store.compare_set("meeting", "", ALL)
        return self._wait("meeting", limit_s) or self._store.compare_set("meeting", "", SHORT).decode()

    def has_met(self) -> bool:
        """Whether all parents have met after its end, so that the next generation begins."""
        return self._store.check(["meeting"]) and self._store.get("meeting").decode() == ALL

    def await_meeting(self, limit_s: float) -> str:
        """Its answer, for somebody who does not take part; ``SHORT`` where none comes."""
        return self._wait("meeting", limit_s) or SHORT

    def leave(self) -> str:
        """This parent goes and its rank with it: no meeting is to wait for it, and no rank comes back."""
        self._store.compare_set("meeting", "", SHORT)
        return self.tell(LEFT)

    def _wait(self, key: str, limit_s: float) -> str | None:
        return self._store.get(key).decode() if has_come(self._store, key, limit_s) else None


def follow(
    board_of: Callable[[int], Board],
    generation: int,
    take: Callable[[Board], str],
    meet_s: float,
    look_s: float = LOOK_S,
) -> str:
    """From this generation on without a rank: ``GENERATION WORD``, and no word where nothing has happened in time.

    The word is what ``take`` says of a generation whose ranks are to start again, if it says something, ``ENDED``, or
    ``SHORT`` where the launcher has its turn.
    """
    until = time.monotonic() + look_s
    while True:
        board = board_of(generation)
        event = board.await_event(until - time.monotonic())
        if not event or event == ENDED:
            return f"{generation} {event}".rstrip()
        if not event.startswith(AGAIN):
            return f"{generation} {SHORT}"
        if taken := take(board):
            return f"{generation} {taken}"
        if board.await_meeting(meet_s + FOLLOW_S / 2) != ALL:
            return f"{generation} {SHORT}"
        generation += 1
