# SPDX-License-Identifier: Apache-2.0
"""Clock and threads of a simulated process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from megatron_moetion.replicate.worker import Event, Lock, Thread, Worker
from megatron_moetion.sim.schedule import Process, Simulator, Task

T = TypeVar("T")
P = ParamSpec("P")


class SimClock:
    """``Clock`` of a process. ``skew_s`` moves the time of day of its machine."""

    EPOCH_NS = 1_700_000_000 * 10**9

    def __init__(self, simulator: Simulator, skew_s: Callable[[], float] = lambda: 0.0) -> None:
        self._simulator = simulator
        self._skew_s = skew_s

    def monotonic(self) -> float:
        """See ``Clock``."""
        return self._simulator.now_s

    def unix_ns(self) -> int:
        """See ``Clock``."""
        return self.EPOCH_NS + int((self._simulator.now_s + self._skew_s()) * 1e9)

    def sleep(self, seconds: float) -> None:
        """See ``Clock``."""
        until_s = self._simulator.now_s + max(0.0, seconds)
        while self._simulator.now_s < until_s:
            self._simulator.block("sleep", until_s)


class SimLock:
    """``Lock``; ``is_reentrant``: its holder may take it again."""

    def __init__(self, simulator: Simulator, *, is_reentrant: bool = False) -> None:
        self._simulator = simulator
        self._is_reentrant = is_reentrant
        self._holder: Task | None = None
        self._depth = 0
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """See ``Lock``."""
        simulator = self._simulator
        simulator.check()
        me = simulator.current
        if self._is_reentrant and self._holder is me:
            self._depth += 1
            return True
        until_s = simulator.now_s + timeout if timeout >= 0 else None
        while self._holder is not None:
            if not blocking or (until_s is not None and simulator.now_s >= until_s):
                return False
            self._waiting.append(me)
            try:
                simulator.block(f"a lock that {self._holder.process.name}/{self._holder.name} has", until_s)
            finally:
                self._waiting.remove(me)
        self._holder, self._depth = me, 1
        return True

    def release(self) -> None:
        """See ``Lock``."""
        self._depth -= 1
        if self._depth > 0:
            return
        self._holder = None
        for task in self._waiting:
            self._simulator.wake(task)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.release()

    @property
    def is_mine(self) -> bool:
        """Whether the current thread holds it."""
        return self._holder is self._simulator.current

    def let_go(self) -> int:
        """Release it however often it was taken; returns that."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_back(self, depth: int) -> None:
        """Undo ``let_go``."""
        self.acquire()
        self._depth = depth


class SimCondition(threading.Condition):
    """``threading.Condition`` over a reentrant lock."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._own = SimLock(simulator, is_reentrant=True)
        self._sleepers: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """See ``threading.Condition``."""
        return self._own.acquire(blocking, timeout)

    def release(self) -> None:
        """See ``threading.Condition``."""
        self._own.release()

    def __enter__(self) -> bool:
        return self._own.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own.is_mine:  # a thread that was killed in ``wait`` does not have it
            self._own.release()

    def wait(self, timeout: float | None = None) -> bool:
        """See ``threading.Condition``."""
        simulator, me = self._simulator, self._simulator.current
        simulator.check()
        assert self._own.is_mine, "the lock of a condition is held while it is waited for"
        depth = self._own.let_go()
        self._sleepers.append(me)
        try:
            found = simulator.block("a condition", None if timeout is None else simulator.now_s + timeout)
        finally:
            if me in self._sleepers:
                self._sleepers.remove(me)
        self._own.take_back(depth)
        return found

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """See ``threading.Condition``."""
        until_s = None if timeout is None else self._simulator.now_s + timeout
        found = predicate()
        while not found:
            left_s = None if until_s is None else until_s - self._simulator.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
            found = predicate()
        return found

    def notify(self, n: int = 1) -> None:
        """See ``threading.Condition``."""
        for task in self._sleepers[:n]:
            self._sleepers.remove(task)
            self._simulator.wake(task)

    def notify_all(self) -> None:
        """See ``threading.Condition``."""
        self.notify(len(self._sleepers))


class SimEvent:
    """See ``Event``."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._is_set = False
        self._waiting: list[Task] = []
        self._told: list[Task] = []
        """Those that waited when it came about: they go on although it may have been cleared since."""

    def is_set(self) -> bool:
        """See ``Event``."""
        return self._is_set

    def set(self) -> None:
        """See ``Event``."""
        self._is_set = True
        self._told += [task for task in self._waiting if task not in self._told]
        for task in self._waiting:
            self._simulator.wake(task)

    def clear(self) -> None:
        """See ``Event``."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """See ``Event``."""
        simulator, me = self._simulator, self._simulator.current
        simulator.check()
        until_s = None if timeout is None else simulator.now_s + timeout
        self._waiting.append(me)
        try:
            while not self._is_set and me not in self._told and (until_s is None or simulator.now_s < until_s):
                simulator.block("an event", until_s)
            return self._is_set or me in self._told
        finally:
            self._waiting.remove(me)
            if me in self._told:
                self._told.remove(me)


class SimFuture(Future[T]):
    """A ``Future`` whose result is waited for in virtual time."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self._event = SimEvent(simulator)
        self.add_done_callback(lambda _: self._event.set())

    def result(self, timeout: float | None = None) -> T:
        """See ``Future``."""
        self._event.wait(timeout)
        return super().result(0)


class SimWorker:
    """``Worker`` in a simulated thread."""

    def __init__(self, simulator: Simulator, process: Process, name: str) -> None:
        self._simulator = simulator
        self._calls: list[tuple[SimFuture[Any], Callable[[], Any]]] = []
        self._news = SimEvent(simulator)
        self._is_closed = False
        self._task = simulator.spawn(process, name, self._run)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See ``Worker``."""
        future: SimFuture[T] = SimFuture(self._simulator)
        if self._is_closed:
            future.cancel()
        else:
            self._calls.append((future, lambda: call(*args, **kwargs)))
            self._news.set()
        return future

    def close(self) -> None:
        """See ``Worker``."""
        self._stop()
        self._simulator.join(self._task, None)

    def abandon(self) -> None:
        """See ``Worker``."""
        self._stop()
        if self._simulator.current is not self._task:
            self._simulator.join(self._task, self._simulator.now_s + 0.3)

    def _stop(self) -> None:
        self._is_closed = True
        self._news.set()

    def _run(self) -> None:
        while True:
            self._news.wait()
            while self._calls:
                future, call = self._calls.pop(0)
                if self._is_closed or not future.set_running_or_notify_cancel():
                    future.cancel()
                    continue
                try:
                    found = call()
                except Exception as error:  # whoever asks for the result gets it
                    future.set_exception(error)
                else:
                    future.set_result(found)
            if self._is_closed:
                return
            self._news.clear()


class SimThread:
    """See ``Thread``."""

    def __init__(self, simulator: Simulator, task: Task) -> None:
        self._simulator = simulator
        self._task = task

    @property
    def is_current(self) -> bool:
        """See ``Thread``."""
        return self._simulator.current is self._task

    def is_alive(self) -> bool:
        """See ``Thread``."""
        return not self._task.is_over

    def join(self, timeout: float | None = None) -> None:
        """See ``Thread``."""
        self._simulator.join(self._task, None if timeout is None else self._simulator.now_s + timeout)


class SimThreads:
    """``Threads`` of one process. ``most`` is the largest number of threads that it has had at once."""

    def __init__(self, simulator: Simulator, process: Process) -> None:
        self._simulator = simulator
        self._process = process
        self.most = 0

    def worker(self, name: str) -> Worker:
        """See ``Threads``."""
        self._simulator.check()
        found = SimWorker(self._simulator, self._process, name)
        self._count()
        return found

    def event(self) -> Event:
        """See ``Threads``."""
        return SimEvent(self._simulator)

    def condition(self) -> threading.Condition:
        """See ``Threads``."""
        return SimCondition(self._simulator)

    def lock(self) -> Lock:
        """See ``Threads``."""
        return SimLock(self._simulator)

    def start(self, call: Callable[[], None], name: str) -> Thread:
        """See ``Threads``."""
        self._simulator.check()
        found = SimThread(self._simulator, self._simulator.spawn(self._process, name, call))
        self._count()
        return found

    def wait(self, futures: Collection[Future[None]], timeout_s: float) -> bool:
        """See ``Threads``."""
        until_s = self._simulator.now_s + timeout_s
        for future in futures:
            assert isinstance(future, SimFuture)
            future._event.wait(max(0.0, until_s - self._simulator.now_s))
        return all(future.done() for future in futures)

    def _count(self) -> None:
        self.most = max(self.most, len(self._process.tasks))
