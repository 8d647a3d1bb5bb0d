# SPDX-License-Identifier: Apache-2.0
"""Children of a process with one thread: ranks, and errands that may block; every wait for them hears signals."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

KILL_S = 120.0
"""For a process to be gone after SIGKILL: a driver may hold it."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class Errand:
    """A child that does one thing, deaf to the signals that a parent forwards, and what it says."""

    def __init__(self, act: Callable[[Callable[[str], None]], None]) -> None:
        self._heard, says = os.pipe()

        def run() -> None:
            os.close(self._heard)

            def say(text: str) -> None:
                os.write(says, text.encode())
                os.close(says)

            act(say)

        self.pid = fork(dict.fromkeys(FORWARDED, signal.SIG_IGN), run)
        os.close(says)

    def hear(self) -> str:
        """What it says, once it has said all or is gone; empty for nothing. To be called once."""
        heard, self._heard = self._heard, -1
        with open(heard, "rb") as words:
            return words.read().decode()

    def hear_within(self, limit_s: float) -> str:
        """As ``hear``; empty, and the errand is over, where it has not ended in time."""
        if wait_for(self.pid, limit_s) is not None:
            return self.hear()
        self.end()
        return ""

    def end(self) -> None:
        """End it at once, if it is still there."""
        end(self.pid)
        if self._heard >= 0:
            os.close(self._heard)
            self._heard = -1


def fork(handlers: Mapping[signal.Signals, Any], act: Callable[[], None]) -> int:
    """A child that ends with this process, with these handlers of signals."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)  # here too, so that the group is there whoever comes first
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return pid
    os.setpgid(0, 0)  # what is sent to the parent's group reaches the rank once, through the parent
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED, signal.SIGCHLD})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        act()
    except Exception as error:  # an errand's: a rank's own way out is ``SystemExit``
        print(first_line(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait_for(pid: int, limit_s: float) -> tuple[int, int] | None:
    """The id and status of a child that has ended, this one or (-1) any; None after the limit. Signals are heard.

    SIGCHLD is blocked in this process.
    """
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


def end(pid: int) -> None:
    """End a child at once, unless it has ended; its number may be another's then."""
    try:
        found, _ = os.waitpid(pid, os.WNOHANG) if pid else (1, 0)
    except ChildProcessError:
        return
    if not found:
        os.kill(pid, signal.SIGKILL)
        wait_for(pid, KILL_S)


def tell_group(pid: int, number: int) -> None:
    """A rank is the first of a process group of its own; ``pid`` 0: there is none."""
    if pid:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return str(error).partition("\n")[0]
