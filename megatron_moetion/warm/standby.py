# SPDX-License-Identifier: Apache-2.0
"""A machine that stands by: one process that has imported everything, and forks the parents of a lost machine's ranks.

It is no part of the launch. It follows what the parents tell each other. After a fault all machines that are there say
so at once, and it takes the place of one that does not. A machine whose place was taken does not get it back, however
late it answers. A standby that ends, waiting or not, leaves a job as it would be without it.

It waits for as long as the job's rendezvous store answers, which it asks every few minutes. Like a parent it sends
children on errands to stores.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_moetion.config import ENDPOINT, STANDBY
from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.replicate.witness import open_endpoint
from megatron_moetion.warm.board import AGAIN, DONE, ENDED, FOLLOW_S, LEAVE, LOOK_S, TAKEN, Board, exit_code_of, follow
from megatron_moetion.warm.children import ENDING, FORWARDED, Errand, fork, wait_for
from megatron_moetion.warm.launch import STORE_TIMEOUT, Launch, await_published
from megatron_moetion.warm.parent import TELL_S, Parent
from megatron_moetion.warm.waiting import Published, place

_ALARM = signal.SIGUSR1
_PAUSE_S = 1.0
"""Before a launch is looked for again."""


class Standby:
    """SIGUSR1 says that a machine is lost, from whoever watches machines: ranks need not find it out by themselves."""

    def __init__(self, program: Callable[[], NoReturn], launch: Launch) -> None:
        self._program = program
        self._asked = launch
        self._endpoint = launch.environ[ENDPOINT]
        self._note = Path(launch.environ[STANDBY])
        self._name = uuid.uuid4().hex
        self._launch: Launch | None = None
        self._token = ""
        self._parents: dict[int, int] = {}

    def run(self) -> int:
        """Launch after launch until a place is taken, then until its ranks have ended; the exit code."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        with ExitStack() as stack:
            stack.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGCHLD})
            before = signal.signal(_ALARM, self._raise_alarm)
            stack.callback(signal.signal, _ALARM, before)
            gc.collect()
            gc.freeze()  # memory that the forks share stays shared
            number, generation = 0, 0
            while True:
                if self._launch is None:
                    number, generation = self._find_launch(number), 0
                    continue
                said = self._errand(partial(self._follow, self._launch, generation)).hear_within(LOOK_S + FOLLOW_S)
                followed, _, word = said.partition(" ")
                if word == ENDED:
                    return 0
                if word.startswith(TAKEN):
                    signal.signal(_ALARM, signal.SIG_IGN)  # whoever raises it has not seen the note yet
                    return self._serve(self._launch, int(followed), word)
                if not said:  # its store does not answer: if the launch goes on, it is found again
                    print(f"> {socket.gethostname()} has lost sight of the launch, and looks for it", flush=True)
                    time.sleep(_PAUSE_S)
                    self._launch, number = None, number - 1
                elif word:  # the launcher has its turn
                    self._launch = None
                else:
                    generation = int(followed)

    def _find_launch(self, after: int) -> int:
        """Stand by for the newest launch after this one, if it comes in time; its number, else ``after``."""
        said = self._errand(lambda: self._published(after)).hear_within(LOOK_S + FOLLOW_S)
        if not said:
            raise ChannelError(
                f"the job's rendezvous store at {self._endpoint} is gone: there is nothing to stand by for"
            )
        number, _, text = said.partition(" ")
        if text:
            found = Published(int(number), text)
            self._launch = replace(self._asked, environ={**self._asked.environ, **found.environ}, timeout=STORE_TIMEOUT)
            self._token = found.token
            world_size = int(found.environ.get("WORLD_SIZE", "1"))
            if world_size != self._asked.world_size:
                raise ConfigError(
                    f"the job has {world_size} ranks now, and this machine stands by for one of "
                    f"{self._asked.world_size}: start it again"
                )
            print(f"> {socket.gethostname()} stands by for a lost machine of {self._launch.num_places}", flush=True)
        return int(number)

    def _serve(self, launch: Launch, generation: int, taken: str) -> int:
        """Be the machine whose place this is now; the first exit code that is not 0."""
        _, number, name = taken.split(" ", 2)
        ranks = [int(number) * launch.ranks_a_place + local for local in range(launch.ranks_a_place)]
        print(f"> {socket.gethostname()} takes the place of {name} (ranks {ranks[0]}-{ranks[-1]})", flush=True)
        scratch = self._note.with_name(f".{self._note.name}.{os.getpid()}")
        scratch.write_text(name)
        scratch.replace(self._note)
        before = {number: signal.signal(number, self._forward) for number in ENDING}
        handlers = {number: before.get(number, signal.SIG_DFL) for number in FORWARDED}
        for rank in ranks:
            self._parents[fork(handlers, partial(self._be_a_parent, launch, generation, rank))] = rank
        code = 0
        while self._parents and (ended := wait_for(-1, float("inf"))):
            if self._parents.pop(ended[0], None) is not None:
                found = os.waitstatus_to_exitcode(ended[1])
                code = code or exit_code_of(found)
                if found < 0:  # what a killed parent knew nobody knows
                    self._forward(signal.SIGTERM, None)
        return code

    def _be_a_parent(self, launch: Launch, generation: int, rank: int) -> NoReturn:
        mine = place(rank, rank % launch.ranks_a_place, launch.ranks_a_place)
        os.environ.update({**launch.environ, **mine})
        os.environ.pop(STANDBY, None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        here = replace(launch, rank=rank, environ={**launch.environ, **mine}, timeout=self._asked.timeout)
        with Parent(self._program, here, self._token) as parent:
            code = parent.join(generation)
        # Whoever started this takes 0 for the end of the job, and ends what is left of it.
        os._exit(code or (0 if parent.heard_the_end else exit_code_of(-signal.SIGTERM)))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for pid in self._parents:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _raise_alarm(self, number: int, frame: FrameType | None) -> None:
        if (launch := self._launch) is not None:
            self._errand(lambda: _tell_lost(launch.boards(self._token), launch.limit)).hear_within(TELL_S)
            os.kill(os.getpid(), signal.SIGCHLD)  # this wait may have taken the one that ``run`` waits for

    # -- errands ---------------------------------------------------------------------------------------

    def _errand(self, act: Callable[[], str]) -> Errand:
        def run(say: Callable[[str], None]) -> None:
            with suppress(RuntimeError):  # torch raises nothing narrower for a store that is gone
                say(act())

        return Errand(run)

    def _published(self, after: int) -> str:
        found = await_published(open_endpoint(self._endpoint, STORE_TIMEOUT), after, LOOK_S)
        return f"{found.number} {found.text}" if found else f"{after} "

    def _follow(self, launch: Launch, generation: int) -> str:
        def take(board: Board) -> str:
            taken = board.take_a_lost_place(self._name, launch.patience_s)
            if taken is None:
                return ""
            before = f"place {taken}"
            with suppress(RuntimeError):  # the place is taken, whatever it was called
                before = launch.rename(taken, self._token)
            return f"{TAKEN} {taken} {before}"

        return follow(launch.boards(self._token), generation, take, launch.meet_s)


def _tell_lost(board_of: Callable[[int], Board], limit: int) -> str:
    """To the generation that trains; to none while one is being replaced: the next one is not there yet."""
    generation = 0
    while (board := board_of(generation)).has_event():
        if generation == limit or not board.has_met():
            return DONE
        generation += 1
    return board.tell(f"{AGAIN if generation < limit else LEAVE} a machine shows no sign of life")
