# SPDX-License-Identifier: Apache-2.0
"""A rank that comes back without its process being started anew: a parent that has imported everything forks it.

The launcher starts parents. Each forks its rank, and forks it again where a rank of the job has died: what remains of a
restart is to connect, to build the model and to recover. A parent has one thread, no process group and no CUDA context,
so whatever a fresh process would find is what the fork finds. Parents learn of each other through the launcher's store.
Where it has none that outlives ranks, a process of rank 0's parent hosts one. What parents cannot mend they leave to
the launcher: a node that is gone, a mistake in the settings, too many faults.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError, ConfigError, HungPeer, ProtectionLost
from megatron_moetion.rendezvous import HOSTED, agree_on_token, open_store

MEET_S = 60.0
"""For the parents of all ranks after a fault: large processes take a while to end, and a lost node never comes."""
LOOK_S = 3600.0
"""A listener asks the store again after so long."""
ENDED, AGAIN, LEAVE = "ended", "again", "leave"
ALL, SHORT = "all", "short"
_AGAIN_CODES = frozenset({1, ProtectionLost.exit_code, HungPeer.exit_code})
"""Of errors that a peer's death causes too, and of what a new process mends."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


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


class Board:
    """What the parents of one launch tell each other about one generation of ranks."""

    def __init__(self, store: dist.Store, token: str, generation: int, world_size: int) -> None:
        self._store = dist.PrefixStore(f"moetion/warm/{token}/{generation}", store)
        self._world_size = world_size

    def tell(self, event: str) -> None:
        """What has happened to this generation; the first word counts."""
        self._store.compare_set("event", "", event)

    def tell_ended(self) -> None:
        """One rank has done all its work. The last one says it for all."""
        if self._store.add("ended", 1) == self._world_size:
            self.tell(ENDED)

    def wait_for_event(self, limit_s: float) -> str | None:
        """The word that counts; None after the limit."""
        return self._wait("event", limit_s)

    def meet(self, limit_s: float) -> bool:
        """Whether all parents have come here, each after its rank had ended. False: one is missing, or gone."""
        if self._store.add("met", 1) == self._world_size:
            self._store.compare_set("meeting", "", ALL)
        return self._wait("meeting", limit_s) == ALL

    def part(self) -> None:
        """This parent goes: nobody is to wait for it."""
        self._store.compare_set("meeting", "", SHORT)

    def _wait(self, key: str, limit_s: float) -> str | None:
        try:
            self._store.wait([key], timedelta(seconds=limit_s))
        except dist.DistStoreError as error:
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                return None
            raise
        return self._store.get(key).decode()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a parent knows from the launcher."""

    rank: int
    world_size: int
    environ: Mapping[str, str]
    limit: int
    """Restarts, until they are the launcher's again."""
    timeout: timedelta
    """For the parents to find each other when they begin."""
    meet_s: float = MEET_S

    def board(self, token: str, generation: int) -> Board:
        """By a connection of its own: none is open where a rank is forked."""
        store = open_store(self.environ, self.rank, self.world_size, self.timeout)
        return Board(store, token, generation, self.world_size)

    @property
    def has_store(self) -> bool:
        """Whether the launcher's store outlives ranks."""
        return self.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def environment_of(self, generation: int) -> dict[str, str]:
        """What the launcher would have said, had it started this rank again."""
        counts = {"TORCHELASTIC_RESTART_COUNT": generation, "TORCHELASTIC_MAX_RESTARTS": self.limit}
        return {name: str(int(self.environ.get(name) or 0) + more) for name, more in counts.items()}


def stay(program: Callable[[], NoReturn], launch: Launch) -> int:
    """Fork the rank that runs ``program``, as often as it takes; the exit code for the launcher.

    Everything that ranks have in common has been imported before. Collective among the parents. ``ChannelError`` where
    one does not come in time, ``ConfigError`` where there is no launcher, and where this process has what cannot be
    shared with a fork.
    """
    if "MASTER_ADDR" not in launch.environ:
        raise ConfigError("--moetion-warm-restarts needs a launcher that sets MASTER_ADDR: start with torchrun")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(
            "an import of this program has made a CUDA context, which a forked rank cannot use: leave "
            "--moetion-warm-restarts out"
        )
    with ExitStack() as stack:
        if not launch.has_store:
            if launch.rank == 0:
                stack.callback(_close_store, _host_store(launch), os.getpid())
            os.environ[HOSTED] = "1"
            launch = replace(launch, environ={**launch.environ, HOSTED: "1"})
        token = _meet(launch)
        gc.collect()
        gc.freeze()  # memory that the forks share stays shared
        return stack.enter_context(_Parent(program, launch, token)).run()


def _meet(launch: Launch) -> str:
    """What these parents call their launch. No connection stays open."""
    store = dist.PrefixStore("moetion/warm", open_store(launch.environ, launch.rank, launch.world_size, launch.timeout))
    restarts = int(launch.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return agree_on_token(store, launch.rank, launch.world_size, launch.timeout, restarts)


def _host_store(launch: Launch) -> int:
    """A process with the launch's store; ``ChannelError`` where the port is taken."""
    heard, says = os.pipe()
    pid = _fork({}, lambda: _serve_store(launch, says))
    os.close(says)
    with open(heard, "rb") as words:
        if not words.read(1):
            _end(pid)
            place = f"{launch.environ['MASTER_ADDR']}:{launch.environ['MASTER_PORT']}"
            raise ChannelError(f"no store can be opened at {place}: the reason is above")
    return pid


def _serve_store(launch: Launch, says: int) -> None:
    try:
        store = open_store(launch.environ, 0, launch.world_size, launch.timeout)
    except RuntimeError as error:  # torch raises nothing narrower for a port that is taken
        print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
        os._exit(1)
    os.write(says, b"1")
    while store is not None:
        signal.pause()


def _close_store(pid: int, parent: int) -> None:
    if os.getpid() == parent:  # a rank that ends leaves by the same way
        _end(pid)


class _Parent:
    """Signals that reach it go to its rank, while it is entered."""

    def __init__(self, program: Callable[[], NoReturn], launch: Launch, token: str) -> None:
        self._program = program
        self._launch = launch
        self._token = token
        self._rank_pid = 0
        self._is_told_to_end = False

    def __enter__(self) -> _Parent:
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self) -> int:
        """Generation after generation."""
        for generation in range(self._launch.limit + 1):
            code, goes_on = self._see_through(generation)
            if not goes_on:
                return exit_code_of(code)
            self._say(f"the ranks start again from warm parents ({generation + 1} of {self._launch.limit})")
        raise AssertionError("the last generation is followed by none")

    def _see_through(self, generation: int) -> tuple[int, bool]:
        """One generation: how its rank has ended, and whether another one follows."""
        self._rank_pid = _fork(self._before, lambda: self._be_the_rank(generation))
        listener = _fork(self._before, lambda: self._listen(generation))
        if self._is_told_to_end:  # while the rank's number was not known
            _tell_group(self._rank_pid, signal.SIGTERM)
        code = 0
        event: str | None = None
        try:
            board = self._launch.board(self._token, generation)
            while event is None:
                pid, status = os.waitpid(-1, 0)
                if pid == self._rank_pid:
                    self._rank_pid, code = 0, os.waitstatus_to_exitcode(status)
                    if code:
                        _tell_group(pid, signal.SIGTERM)
                    if self._is_told_to_end:  # the others are told by their own launchers, if they are to end
                        board.part()
                        return code, False
                    said = verdict(code, restarts_left=self._launch.limit - generation)
                    if said == ENDED:
                        board.tell_ended()
                    else:
                        board.tell(said)
                elif pid == listener:
                    listener = 0
                    event = board.wait_for_event(self._launch.meet_s)
                    if event is None:
                        raise ChannelError("its listener has ended without an event")
            if event == ENDED:
                return 0, False
            code = self._end_rank() or code
            if event == AGAIN and not self._is_told_to_end:
                if board.meet(self._launch.meet_s):
                    return code, not self._is_told_to_end
                limit = f"{self._launch.meet_s:.0f} s"
                self._say(f"not all ranks came to start again within {limit}: this is left to the launcher")
            else:
                board.part()
        except (ChannelError, RuntimeError) as error:  # of the store: its host is gone, or about to go
            why = str(error).partition("\n")[0]
            self._say(f"the launcher's store cannot be reached, what follows is left to the launcher: {why}")
            code = self._await_rank() or code
        finally:
            _end(listener)
            self._end_rank()
        return code, False

    # -- processes -------------------------------------------------------------------------------------

    def _be_the_rank(self, generation: int) -> None:
        os.environ.update(self._launch.environment_of(generation))
        self._program()

    def _listen(self, generation: int) -> None:
        """End when something has happened to this generation anywhere."""
        with suppress(Exception):
            board = self._launch.board(self._token, generation)
            while board.wait_for_event(LOOK_S) is None:
                pass

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """To the rank; what ends it goes to all that it has started too, as launchers do it."""
        if number in (signal.SIGTERM, signal.SIGINT):
            self._is_told_to_end = True
            _tell_group(self._rank_pid, number)
        elif self._rank_pid:
            with suppress(ProcessLookupError):
                os.kill(self._rank_pid, number)

    def _end_rank(self) -> int:
        """End what is left of a generation at once, its memory is safe; how it has ended, 0 where it had."""
        pid, self._rank_pid = self._rank_pid, 0
        code = _end(pid)
        _tell_group(pid, signal.SIGTERM)  # processes that it has started end as under a launcher
        return code

    def _await_rank(self) -> int:
        """Let it train on: it needs no parent for that."""
        if not self._rank_pid:
            return 0
        _, status = os.waitpid(self._rank_pid, 0)
        self._rank_pid = 0
        return os.waitstatus_to_exitcode(status)

    def _say(self, text: str) -> None:
        if self._launch.rank == 0:
            print(f"> {text}", flush=True)


def _fork(handlers: Mapping[signal.Signals, Any], act: Callable[[], None]) -> int:
    """A child that ends with this process, with these handlers of signals."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)  # here too, so that the group is there whoever comes first
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return pid
    os.setpgid(0, 0)  # what is sent to the parent's group reaches the rank once, through the parent
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    act()
    os._exit(0)


def _end(pid: int) -> int:
    """End a child at once; how it has ended, 0 where there is none."""
    if not pid:
        return 0
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # it has ended before
        return 0
    return os.waitstatus_to_exitcode(status)


def _tell_group(pid: int, number: int) -> None:
    """A rank is the first of a process group of its own; ``pid`` 0: there is none."""
    if pid:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
