# SPDX-License-Identifier: Apache-2.0
"""A rank that comes back without its process being started anew: a parent that has imported everything forks it.

The launcher starts parents. Each forks its rank, and forks it again where a rank of the job has died: what remains of a
restart is to connect, to build the model and to recover. A parent has one thread, no process group and no CUDA context,
so whatever a fresh process would find is what the fork finds. Parents learn of each other through the launcher's store.
Where it has none that outlives ranks, a process of rank 0's parent hosts one. What parents cannot mend they leave to
the launcher: a node that is gone, a mistake in the settings, too many faults.

A parent never talks to the store itself, which could block it for as long as the network likes. Children that run
errands do; a parent waits for them, and for its rank, so that it always hears signals and every wait has an end.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError, ConfigError, HungPeer, ProtectionLost
from megatron_moetion.rendezvous import HOSTED, agree_on_token, open_store

MEET_S = 60.0
"""For the parents of all ranks after a fault: large processes take a while to end, and a lost node never comes."""
TELL_S = 10.0
"""For the store to take a word."""
FINISH_S = 3600.0
"""A parent whose rank has done all its work waits so long for the others: one that was killed says nothing."""
KILL_S = 120.0
"""For a process to be gone after SIGKILL: a driver may hold it."""
LISTENERS_MAX = 5
"""A listener that ends for nothing is replaced so often in one generation."""
_LOOK_S = 2_000_000.0
"""The longest wait that torch's store takes, with a few days to spare; it writes two lines when it runs out."""
ENDED, AGAIN, LEAVE, LEFT = "ended", "again", "leave", "left"
LOST = "lost"
"""In place of an event: the store does not answer."""
ALL, SHORT, DONE = "all", "short", "done"
_AGAIN_CODES = frozenset({ChannelError.exit_code, ProtectionLost.exit_code, HungPeer.exit_code})
"""Of errors that a peer's death causes too (1 is a traceback's as well), and of what a new process mends."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_CUDA_NOT_INITIALIZED = 3


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
    """What the parents of one launch tell each other about one generation of ranks. Calls may block."""

    def __init__(self, store: dist.Store, token: str, generation: int, world_size: int) -> None:
        self._store = dist.PrefixStore(f"moetion/warm/{token}/{generation}", store)
        self._world_size = world_size

    def tell(self, event: str) -> str:
        """What has happened to this generation; the first word counts."""
        self._store.compare_set("event", "", event)
        return DONE

    def tell_ended(self) -> str:
        """One rank has done all its work. The last one says it for all."""
        if self._store.add("ended", 1) == self._world_size:
            self.tell(ENDED)
        return DONE

    def await_event(self) -> str:
        """The word that counts."""
        while (said := self._wait("event", _LOOK_S)) is None:
            pass
        return said

    def meet(self, limit_s: float) -> str:
        """``ALL`` once all parents have come here, each after its rank had ended; ``SHORT`` where one does not come.

        It is one answer for all of them.
        """
        if self._store.add("met", 1) == self._world_size:
            self._store.compare_set("meeting", "", ALL)
        return self._wait("meeting", limit_s) or self._store.compare_set("meeting", "", SHORT).decode()

    def leave(self) -> str:
        """This parent goes and its rank with it: no meeting is to wait for it, and no rank comes back."""
        self._store.compare_set("meeting", "", SHORT)
        return self.tell(LEFT)

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

    @property
    def restarts(self) -> int:
        """The launcher's own, so far."""
        return int(self.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)

    def environment_of(self, generation: int) -> dict[str, str]:
        """What a launcher would have said that counts all restarts: no two attempts of a job have one number."""
        each = self.limit + 1
        allowed = int(self.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
        return {
            "TORCHELASTIC_RESTART_COUNT": str(self.restarts * each + generation),
            "TORCHELASTIC_MAX_RESTARTS": str((allowed + 1) * each - 1),
        }


def stay(program: Callable[[], NoReturn], launch: Launch) -> int:
    """Fork the rank that runs ``program``, as often as it takes; the exit code for the launcher.

    Everything that ranks have in common has been imported before. Collective among the parents. ``ChannelError`` where
    one does not come in time, ``ConfigError`` where there is no launcher, and where this process has what cannot be
    shared with a fork.
    """
    if "MASTER_ADDR" not in launch.environ:
        raise ConfigError("--moetion-warm-restarts needs a launcher that sets MASTER_ADDR: start with torchrun")
    if has_called_cuda():
        raise ConfigError(
            "an import of this program has called CUDA, which a forked rank could not use then: leave "
            "--moetion-warm-restarts out"
        )
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1 and launch.rank == 0:
        print(f"> a warm parent has {threads} threads; set OMP_NUM_THREADS=1 if forked ranks hang", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with ExitStack() as stack:
        stack.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if not launch.has_store:
            if launch.rank == 0:
                stack.callback(_close_store, _host_store(launch), os.getpid())
            os.environ[HOSTED] = str(launch.restarts)
            launch = replace(launch, environ={**launch.environ, HOSTED: str(launch.restarts)})
        token = _meet(launch)
        gc.collect()
        gc.freeze()  # memory that the forks share stays shared
        return stack.enter_context(_Parent(program, launch, token)).run()


def has_called_cuda() -> bool:
    """Whether anything in this process has initialised CUDA's driver, by torch or past it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != _CUDA_NOT_INITIALIZED


def _meet(launch: Launch) -> str:
    """What these parents call their launch. No connection stays open."""
    store = dist.PrefixStore("moetion/warm", open_store(launch.environ, launch.rank, launch.world_size, launch.timeout))
    return agree_on_token(store, launch.rank, launch.world_size, launch.timeout, launch.restarts)


def _host_store(launch: Launch) -> int:
    """A process with the launch's store; ``ChannelError`` where the port is taken."""
    errand = _Errand(lambda say: _serve_store(launch, say))
    if errand.hear() != DONE:
        errand.end()
        place = f"{launch.environ['MASTER_ADDR']}:{launch.environ['MASTER_PORT']}"
        raise ChannelError(f"no store can be opened at {place}: the reason is above")
    return errand.pid


def _serve_store(launch: Launch, say: Callable[[str], None]) -> None:
    try:
        store = open_store(launch.environ, 0, launch.world_size, launch.timeout)
    except RuntimeError as error:  # torch raises nothing narrower for a port that is taken
        print(_first_line(error), file=sys.stderr, flush=True)
        return
    say(DONE)
    while store is not None:
        signal.pause()


def _close_store(pid: int, parent: int) -> None:
    if os.getpid() == parent:  # a rank that ends leaves by the same way
        _end(pid)


class _Errand:
    """A child that does one thing, deaf to the signals that a parent forwards, and what it says."""

    def __init__(self, act: Callable[[Callable[[str], None]], None]) -> None:
        self._heard, says = os.pipe()

        def run() -> None:
            os.close(self._heard)

            def say(text: str) -> None:
                os.write(says, text.encode())
                os.close(says)

            act(say)

        self.pid = _fork(dict.fromkeys(_FORWARDED, signal.SIG_IGN), run)
        os.close(says)

    def hear(self) -> str:
        """What it says, once it has said all or is gone; empty for nothing. To be called once."""
        heard, self._heard = self._heard, -1
        with open(heard, "rb") as words:
            return words.read().decode()

    def end(self) -> None:
        """End it at once, if it is still there."""
        _end(self.pid)
        if self._heard >= 0:
            os.close(self._heard)
            self._heard = -1


class _Parent:
    """Signals that reach it go to its rank, while it is entered."""

    def __init__(self, program: Callable[[], NoReturn], launch: Launch, token: str) -> None:
        self._program = program
        self._launch = launch
        self._token = token
        self._generation = 0
        self._rank_pid = 0
        self._is_told_to_end = False

    def __enter__(self) -> _Parent:
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self) -> int:
        """Generation after generation; the exit code for the launcher."""
        for generation in range(self._launch.limit + 1):
            self._generation = generation
            self._rank_pid = _fork(self._before, self._be_the_rank)
            if self._must_end():  # told so while the rank's number was not known
                _tell_group(self._rank_pid, signal.SIGTERM)
            code, event = self._await_event()
            word, _, why = event.partition(" ")
            if word == ENDED:
                return 0
            if word == LOST:
                return exit_code_of(self._await_rank(code))
            if word == LEFT or self._must_end():  # whoever has told this parent to end has set a limit too
                self._ask(lambda board: board.leave())
                return exit_code_of(self._await_rank(code))
            was_ended = self._end_rank()
            if word == LEAVE:
                return self._leave(code, was_ended)
            if self._ask(lambda board: board.meet(self._launch.meet_s), self._launch.meet_s + TELL_S) != ALL:
                self._say(f"{why}; not all ranks can be started again from warm parents, which the launcher does now")
                return self._leave(code, was_ended)
            if self._must_end():
                return exit_code_of(code or -signal.SIGTERM)
            number = f"{generation + 1} of {self._launch.limit}"
            self._say(f"{why}; the ranks start again from warm parents ({number})")
        raise AssertionError("the last generation is followed by none")

    def _await_event(self) -> tuple[int, str]:
        """How this parent's rank has ended, 0 while it has not, and what has happened to the generation."""
        code, until = 0, float("inf")
        listener, listeners = self._listen(), 1
        try:
            while (pid_and_status := _wait(-1, until - time.monotonic())) is not None:
                pid, status = pid_and_status
                if pid == self._rank_pid:
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
        done = self._ask(lambda board: board.tell_ended() if said == ENDED else board.tell(f"{said} {why}"))
        if not done:
            self._complain(f"{why}, and the launcher's store does not take it; this is left to the launcher")
        return bool(done)

    def _leave(self, code: int, was_ended: bool) -> int:
        """The exit code; a rank that was only ended for others has that of SIGTERM, as under a launcher."""
        if not code or was_ended:
            time.sleep(1)  # the parent of the rank that failed goes first, so that launchers name that one
            code = -signal.SIGTERM
        if not self._launch.has_store and self._launch.rank == 0:
            time.sleep(2)  # it hosts the store
        return exit_code_of(code)

    # -- children --------------------------------------------------------------------------------------

    def _be_the_rank(self) -> None:
        os.environ.update(self._launch.environment_of(self._generation))
        self._program()

    def _listen(self) -> _Errand:
        """Says the event of this generation, when there is one."""
        return self._errand(lambda board: board.await_event())

    def _ask(self, act: Callable[[Board], str], limit_s: float = TELL_S) -> str:
        """What ``act`` returns; empty where the store does not answer in time."""
        errand = self._errand(act)
        if _wait(errand.pid, limit_s) is not None:
            return errand.hear()
        errand.end()
        return ""

    def _errand(self, act: Callable[[Board], str]) -> _Errand:
        def run(say: Callable[[str], None]) -> None:
            with suppress(RuntimeError):  # torch raises nothing narrower for a store that is gone
                say(act(self._launch.board(self._token, self._generation)))

        return _Errand(run)

    def _must_end(self) -> bool:
        """Whether a signal has said so; one may come at any moment."""
        return self._is_told_to_end

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """To the rank; what ends it goes to all that it has started too, as launchers do it."""
        if number in _ENDING:
            self._is_told_to_end = True
            _tell_group(self._rank_pid, number)
        elif self._rank_pid:
            with suppress(ProcessLookupError):
                os.kill(self._rank_pid, number)

    def _end_rank(self) -> bool:
        """End the rank at once, its memory is safe, and tell what it has started; whether there was one."""
        pid, self._rank_pid = self._rank_pid, 0
        _end(pid)
        _tell_group(pid, signal.SIGTERM)
        return pid != 0

    def _await_rank(self, code: int) -> int:
        """How the rank has ended: it trains on without a parent's help."""
        if not self._rank_pid:
            return code
        found = _wait(self._rank_pid, float("inf"))
        self._rank_pid = 0
        return os.waitstatus_to_exitcode(found[1]) if found else code

    def _say(self, text: str) -> None:
        if self._launch.rank == 0:
            print(f"> {text}", flush=True)

    def _complain(self, text: str) -> None:
        print(f"[moetion] rank {self._launch.rank}, warm parent: {text}", file=sys.stderr, flush=True)


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_FORWARDED, signal.SIGCHLD})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        act()
    except Exception as error:  # an errand's: a rank's own way out is ``SystemExit``
        print(_first_line(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _wait(pid: int, limit_s: float) -> tuple[int, int] | None:
    """The id and status of a child that has ended, this one or (-1) any; None after the limit. Signals are heard."""
    until = time.monotonic() + limit_s
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody else has had it
            return None
        if found:
            return found, status
        left = until - time.monotonic()
        if left <= 0:
            return None
        signal.sigtimedwait({signal.SIGCHLD}, min(left, 3600.0))


def _end(pid: int) -> None:
    """End a child at once, unless it has ended; its number may be another's then."""
    try:
        found, _ = os.waitpid(pid, os.WNOHANG) if pid else (1, 0)
    except ChildProcessError:
        return
    if not found:
        os.kill(pid, signal.SIGKILL)
        _wait(pid, KILL_S)


def _tell_group(pid: int, number: int) -> None:
    """A rank is the first of a process group of its own; ``pid`` 0: there is none."""
    if pid:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
