# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP end the body of a ``with`` by an exception, and never what its exit has to do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The first signal raises ``KeyboardInterrupt`` or ``SystemExit(128 + number)``; later ones change nothing.

    Handlers that the program has set itself stay. Only the main thread gets signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._raised = False
        self._closing = False
        self._came: list[int] = []

    def install(self) -> None:
        """From here on signals raise."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._take)

    @contextlib.contextmanager
    def close(self) -> Iterator[None]:
        """Nothing interrupts this, nor the tools that it calls. Then the old handlers are back, and what came acts."""
        self._closing = True
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while self._before:
                signal.signal(*self._before.popitem())
            if self._came and not self._raised:
                os.kill(os.getpid(), self._came[0])

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._raised or self._closing:
            self._came.append(number)
            return
        self._raised = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
