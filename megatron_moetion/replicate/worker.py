# SPDX-License-Identifier: Apache-2.0
"""Threads that run calls in order and never keep a process alive.

The interpreter joins the threads of a ``ThreadPoolExecutor`` before it ends, so a transfer that waits for a dead peer
would hold back an exception, and with it the restart, for as long as the transfer may take.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
_MOMENT_S = 0.3
_Call = tuple["Future[Any]", Callable[[], Any]]


class Event(Protocol):
    """Something that one thread waits for and another one brings about."""

    def is_set(self) -> bool:
        """Whether it has come about."""
        ...

    def set(self) -> None:
        """It has."""
        ...

    def clear(self) -> None:
        """It has yet to."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Return once it has come about, or after the timeout (seconds); whether it has."""
        ...


class Lock(Protocol):
    """Held by one thread at a time."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """See ``threading.Lock``."""
        ...

    def release(self) -> None:
        """See ``threading.Lock``."""
        ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Thread(Protocol):
    """A call that runs by itself."""

    @property
    def is_current(self) -> bool:
        """Whether it is this thread that asks."""
        ...

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Return once it has ended, or after the timeout (seconds)."""
        ...


class Worker(Protocol):
    """Runs calls one after the other, in the background."""

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have it called after all that was submitted before. After ``close`` the call is cancelled at once."""
        ...

    def close(self) -> None:
        """Cancel what has not begun; return when what has begun is done."""
        ...

    def abandon(self) -> None:
        """Cancel what has not begun, and do not wait for what has."""
        ...


class Threads(Protocol):
    """Where background work runs and is waited for: an argument, so that a simulation can schedule it."""

    def worker(self, name: str) -> Worker:
        """A new one."""
        ...

    def event(self) -> Event:
        """One that has not come about."""
        ...

    def condition(self) -> threading.Condition:
        """One that nobody waits on."""
        ...

    def lock(self) -> Lock:
        """One that nobody holds. For what may be held while something else is waited for."""
        ...

    def start(self, call: Callable[[], None], name: str) -> Thread:
        """Call this in a thread that keeps no process alive. ``RuntimeError`` where there is no thread to be had."""
        ...

    def wait(self, futures: Collection[Future[None]], timeout_s: float) -> bool:
        """Return once all are done, or after the timeout; whether all are."""
        ...


class SystemThreads:
    """Threads of this process."""

    def worker(self, name: str) -> Worker:
        """See ``Threads``."""
        return ThreadWorker(name)

    def event(self) -> Event:
        """See ``Threads``."""
        return threading.Event()

    def condition(self) -> threading.Condition:
        """See ``Threads``."""
        return threading.Condition()

    def lock(self) -> Lock:
        """See ``Threads``."""
        return threading.Lock()

    def start(self, call: Callable[[], None], name: str) -> Thread:
        """See ``Threads``."""
        thread = SystemThread(target=call, name=name, daemon=True)
        thread.start()
        return thread

    def wait(self, futures: Collection[Future[None]], timeout_s: float) -> bool:
        """See ``Threads``."""
        return not wait(futures, timeout_s).not_done


class SystemThread(threading.Thread):
    """See ``Thread``."""

    @property
    def is_current(self) -> bool:
        """See ``Thread``."""
        return threading.current_thread() is self


class ThreadWorker:
    """One daemon thread. ``close`` it when it is no longer needed."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See ``Worker``."""
        future: Future[T] = Future()
        if self._is_closed:
            future.cancel()
        else:
            self._calls.put((future, lambda: call(*args, **kwargs)))
        return future

    def abandon(self) -> None:
        """See ``Worker``.

        A thread that is idle, or just done, gets the moment that it needs to end: the interpreter aborts where it ends
        while a thread of its own is on the way back from compiled code.
        """
        self._stop()
        self._thread.join(_MOMENT_S)

    def close(self) -> None:
        """See ``Worker``."""
        self._stop()
        self._thread.join()

    def _stop(self) -> None:
        self._is_closed = True
        self._calls.put(None)

    def _run(self) -> None:
        while (taken := self._calls.get()) is not None:
            future, call = taken
            if self._is_closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)
