# SPDX-License-Identifier: Apache-2.0
"""A process that is told to end stays for as long as its last checkpoint takes: who ends it may end its writer with it.

Python runs a signal's handler between two instructions of the main thread, which may wait in a collective for ever. So
a thread waits for the byte that the interpreter writes when a signal comes, and it ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_STOP = b"\0"
EXIT_CODE = 128 + signal.SIGTERM


class Grace:
    """From ``begin`` until ``close``: on SIGTERM ``last_words`` runs, in a thread, and then the process ends.

    Used by the main thread.
    """

    def __init__(self, last_words: Callable[[], None], end: Callable[[int], object]) -> None:
        self._last_words = last_words
        self._end = end
        self._wake = -1
        self._is_open = False

    def begin(self) -> str | None:
        """Take over the signal. Returns why that cannot be; None where it is done."""
        if threading.current_thread() is not threading.main_thread():
            return "training does not run in the main thread of its process"
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return "the training script handles SIGTERM itself"
        woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        if (other := signal.set_wakeup_fd(self._wake)) != -1:
            signal.set_wakeup_fd(other)
            os.close(woken)
            os.close(self._wake)
            return "something else in this process waits for signals"
        signal.signal(signal.SIGTERM, _nothing)
        self._is_open = True
        os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=self._forget)
        threading.Thread(target=self._wait, args=(woken,), name="moetion-grace", daemon=True).start()
        return None

    def close(self) -> None:
        """Give the signal back."""
        if signal.getsignal(signal.SIGTERM) is _nothing:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.write(self._wake, _STOP)
            os.close(self._wake)
        self._is_open = False

    def _forget(self) -> None:
        """In a forked child: its signals are its own, and must not end this process."""
        if self._is_open:
            self._is_open = False
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _let_through()

    def _wait(self, woken: int) -> None:
        while number := os.read(woken, 1):
            if number == _STOP:
                break
            if number[0] == signal.SIGTERM:
                try:
                    self._last_words()
                finally:
                    self._end(EXIT_CODE)
        os.close(woken)


def _hold_back() -> None:
    """While a process forks: what comes for the child must not find this process's handler in it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _nothing(*_: object) -> None:
    """A handler, so that the signal does not end the process before the thread does."""
