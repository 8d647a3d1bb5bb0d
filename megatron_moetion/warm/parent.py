# SPDX-License-Identifier: Apache-2.0
"""A rank that comes back without its process being started anew: a parent that has imported everything forks it.

The launcher starts parents. Each forks its rank, and forks it again where a rank of the job has died: what remains of a
restart is to connect, to build the model and to recover. A parent has one thread, no process group and no CUDA context,
so whatever a fresh process would find is what the fork finds. Parents learn of each other through the launcher's store.
Where it has none that outlives ranks, a process of rank 0's parent hosts one. A lost machine's parents are replaced by
those of one that stands by (``standby``). What parents cannot mend they leave to the launcher: a node that is gone
without a standby, a mistake in the settings, too many faults.

A parent never talks to the store itself, which could block it for as long as the network likes. Children that run
errands do; a parent waits for them, and for its rank, so that it always hears signals and every wait has an end.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NoReturn

from megatron_moetion.warm.board import (
    AGAIN,
    ALL,
    ENDED,
    FOLLOW_S,
    LEAVE,
    LEFT,
    LOOK_S,
    LOST,
    TAKEN,
    Board,
    exit_code_of,
    follow,
    how,
    verdict,
)
from megatron_moetion.warm.children import (
    ENDING,
    FORWARDED,
    Errand,
    end,
    fork,
    tell_group,
    wait_for,
)
from megatron_moetion.warm.launch import Launch

TELL_S = 10.0
"""For the store to take a word."""
_LOOK_AGAIN_S = 5.0
"""Whether a signal has come meanwhile."""
FINISH_S = 3600.0
"""A parent whose rank has done all its work waits so long for the others: one that was killed says nothing."""
TELLINGS = 3
"""That a rank has done all its work, at most: others wait long for that. What else happens the launcher sees too."""
LISTENERS_MAX = 5
"""A listener that ends for nothing is replaced so often in one generation."""


class Parent:
    """Signals that reach it go to its rank, while it is entered."""

    def __init__(self, program: Callable[[], NoReturn], launch: Launch, token: str) -> None:
        self._program = program
        self._launch = launch
        self._token = token
        self._generation = 0
        self._rank_pid = 0
        self._is_told_to_end = False
        self.heard_the_end = False
        """All ranks have done all their work. Its own rank's end with 0 does not say that."""

    def __enter__(self) -> Parent:
        self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, first: int = 0) -> int:
        """Generation after generation, from this one on; the exit code for the launcher."""
        for generation in range(first, self._launch.limit + 1):
            self._generation = generation
            self._rank_pid = fork(self._before, self._be_the_rank)
            if self._must_end():  # told so while the rank's number was not known
                tell_group(self._rank_pid, signal.SIGTERM)
            code, event = self._await_event()
            word, _, why = event.partition(" ")
            if word == ENDED:
                self.heard_the_end = True
                self._outlive_others()
                return 0
            if word == LOST:
                return exit_code_of(self._await_rank(code))
            if word == TAKEN:
                self._end_rank()
                return self._stand_aside()
            if word == LEFT or self._must_end():  # whoever has told this parent to end has set a limit too
                self._ask(lambda board: board.leave())
                return exit_code_of(self._await_rank(code))
            was_ended = self._end_rank()
            if word == LEAVE:
                return self._leave(code, was_ended)
            if not self._meet():
                self._say(f"{why}; not all ranks can be started again from warm parents, which the launcher does now")
                return self._leave(code, was_ended)
            if self._must_end():
                return exit_code_of(code or -signal.SIGTERM)
            number = f"{generation + 1} of {self._launch.limit}"
            self._say(f"{why}; the ranks start again from warm parents ({number})")
        raise AssertionError("the last generation is followed by none")

    def join(self, generation: int) -> int:
        """As ``run``, from the meeting after this generation on, as a parent of a machine that is lost."""
        self._generation = generation
        if not self._meet():
            self._complain("not all other parents have come; the launcher starts the ranks again")
            return exit_code_of(-signal.SIGTERM)
        return self.run(generation + 1)

    def _meet(self) -> bool:
        """Whether the parents of all ranks have come, after the end of this generation."""
        limit_s = self._launch.meet_s
        return self._ask(lambda board: board.meet(limit_s), limit_s + TELL_S) == ALL

    def _stand_aside(self) -> int:
        """Wait for the end of the job, without a rank: a launcher that saw this parent end would start all again."""
        if self._launch.rank % self._launch.ranks_a_place == 0:
            self._complain("this machine did not answer in time after a fault, and another one has its place now")
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        while not self._must_end():  # told so before
            said = self._errand(self._follow).hear_within(LOOK_S + FOLLOW_S)
            generation, _, word = said.partition(" ")
            if word:
                self.heard_the_end = word == ENDED
                return 0 if word == ENDED else exit_code_of(-signal.SIGTERM)
            if not said:
                break
            self._generation = int(generation)
        return exit_code_of(-signal.SIGTERM)

    def _follow(self, board: Board) -> str:
        return follow(self._launch.boards(self._token), self._generation, lambda board: "", self._launch.meet_s)

    def _await_event(self) -> tuple[int, str]:
        """How this parent's rank has ended, 0 while it has not, and what has happened to the generation."""
        code, until = 0, float("inf")
        listener, listeners = self._listen(), 1
        try:
            while (left_s := until - time.monotonic()) > 0:
                found = wait_for(-1, min(left_s, _LOOK_AGAIN_S))
                if not self._rank_pid and self._must_end():
                    return code, LEFT
                pid, status = found or (0, 0)
                if pid and pid == self._rank_pid:
                    self._rank_pid, code = 0, os.waitstatus_to_exitcode(status)
                    if self._must_end():
                        return code, LEFT
                    if not self._report(code):
                        return code, LOST
                    until = time.monotonic() + FINISH_S
                elif pid == listener.pid:
                    if event := listener.hear():
                        return code, event
                    if listeners == LISTENERS_MAX:
                        self._complain("the launcher's store cannot be reached; a fault is left to the launcher now")
                        return code, LOST
                    listener, listeners = self._listen(), listeners + 1
            self._complain(f"this rank has done its work, and others have not within {FINISH_S:.0f} s")
            return code, LEFT
        finally:
            listener.end()

    def _report(self, code: int) -> bool:
        """Tell the others how this rank has ended; whether that was possible."""
        said = verdict(code, restarts_left=self._launch.limit - self._generation)
        why = f"rank {self._launch.rank} on {socket.gethostname()} has ended with {how(code)}"
        for attempt in range(TELLINGS if said == ENDED else 1):
            if self._ask(partial(self._tell_end, attempt, "" if said == ENDED else f"{said} {why}")):
                return True
            if self._must_end():
                break
        self._complain(f"{why}, and the launcher's store does not take it; this is left to the launcher")
        return False

    def _tell_end(self, attempt: int, event: str, board: Board) -> str:
        return board.tell(event) if event else board.tell_ended(self._launch.rank, attempt)

    def _leave(self, code: int, was_ended: bool) -> int:
        """The exit code; a rank that was only ended for others has that of SIGTERM, as under a launcher."""
        if not code or was_ended:
            time.sleep(1)  # the parent of the rank that failed goes first, so that launchers name that one
            code = -signal.SIGTERM
        self._outlive_others()
        return exit_code_of(code)

    def _outlive_others(self) -> None:
        """They may be in the middle of reading the last word, if this parent hosts the store."""
        if not self._launch.has_store and self._launch.rank == 0:
            time.sleep(2)

    # -- children --------------------------------------------------------------------------------------

    def _be_the_rank(self) -> None:
        os.environ.update(self._launch.environment_of(self._generation))
        self._program()

    def _listen(self) -> Errand:
        """Says the event of this generation, when there is one."""
        return self._errand(self._hear_event)

    def _hear_event(self, board: Board) -> str:
        """What has happened; this machine says at once that it is there, as long as it has its place."""
        event = board.await_event()
        return event if not event.startswith(AGAIN) or board.keep(self._launch.place) else TAKEN

    def _ask(self, act: Callable[[Board], str], limit_s: float = TELL_S) -> str:
        """What ``act`` returns; empty where the store does not answer in time."""
        return self._errand(act).hear_within(limit_s)

    def _errand(self, act: Callable[[Board], str]) -> Errand:
        def run(say: Callable[[str], None]) -> None:
            with suppress(RuntimeError):  # torch raises nothing narrower for a store that is gone
                say(act(self._launch.board(self._token, self._generation)))

        return Errand(run)

    def _must_end(self) -> bool:
        """Whether a signal has said so; one may come at any moment."""
        return self._is_told_to_end

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """To the rank; what ends it goes to all that it has started too, as launchers do it."""
        if number in ENDING:
            self._is_told_to_end = True
            tell_group(self._rank_pid, number)
        elif self._rank_pid:
            with suppress(ProcessLookupError):
                os.kill(self._rank_pid, number)

    def _end_rank(self) -> bool:
        """End the rank at once, its memory is safe, and tell what it has started; whether there was one."""
        pid, self._rank_pid = self._rank_pid, 0
        end(pid)
        tell_group(pid, signal.SIGTERM)
        return pid != 0

    def _await_rank(self, code: int) -> int:
        """How the rank has ended: it trains on without a parent's help."""
        if not self._rank_pid:
            return code
        found = wait_for(self._rank_pid, float("inf"))
        self._rank_pid = 0
        return os.waitstatus_to_exitcode(found[1]) if found else code

    def _say(self, text: str) -> None:
        if self._launch.rank == 0:
            print(f"> {text}", flush=True)

    def _complain(self, text: str) -> None:
        print(f"[moetion] rank {self._launch.rank}, warm parent: {text}", file=sys.stderr, flush=True)
