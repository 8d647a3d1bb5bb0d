# SPDX-License-Identifier: Apache-2.0
"""Virtual time, and threads of which one runs at a time: who goes on is drawn from a seed.

A simulated thread is a thread of the interpreter that holds a baton or waits for it. It gives the baton away only in
``Simulator.block``, which every wait of the runtime ends in. So a run is a function of its seed: of the draws that say
who goes on, and of what is due at which virtual moment. Time passes only while nobody can go on.
"""

from __future__ import annotations

import _thread
import heapq
import random
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress

_STEP_S = 2e-6
"""What a thread takes each time it goes on, so that nobody can turn round and round at one moment."""
_STEPS_AT_ONCE_MAX = 200_000
"""Turns without an event on the way; more is a loop that waits for nothing."""


class Killed(BaseException):
    """The process of this thread has been killed: raised in each of its waits until the thread has ended."""


class Stuck(Exception):
    """A wait that nothing can end, or a loop that waits for nothing. The text names who is where."""


class Process:
    """A simulated process: threads that live and die together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.is_stopped = False
        self.exit_code: int | None = None
        self.at_death: list[Callable[[], None]] = []
        """Called once, when it dies, in order."""
        self.tasks: list[Task] = []


class Task:
    """A simulated thread."""

    def __init__(self, number: int, name: str, process: Process) -> None:
        self.number = number
        self.name = name
        self.process = process
        self.is_over = False
        self.waits_for = ""
        """For a person: what it blocks on."""
        self.baton = threading.Lock()
        self.baton.acquire()
        self.turn = 0
        """Counts its waits, so that a timer of an earlier one is known."""
        self.is_woken = False
        self.after: list[Task] = []
        """Tasks that wait for its end."""


class Simulator:
    """See the module. The thread that makes it is its first task, which is never killed."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.chance = random.Random(seed)
        self.trace = zlib.crc32(b"")
        """A digest of all that has happened so far."""
        self.turns = 0
        """How often a thread has gone on."""
        self.root = Process("launcher")
        self._tasks = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._ready: list[Task] = []
        self._since_event = 0
        self.problem: Exception | None = None
        """What the first task is told at its next wait."""
        self.first = self._new(self.root, "main")
        self._nobody = Task(-1, "nobody", self.root)
        self.current = self.first
        """The thread that has the baton; while the next one is chosen, none of them."""

    # -- threads ---------------------------------------------------------------------------------------

    def spawn(self, process: Process, name: str, call: Callable[[], None]) -> Task:
        """A thread of this process, which goes on when it is drawn."""
        task = self._new(process, name)

        def run() -> None:
            task.baton.acquire()
            try:
                if not process.is_dead:
                    call()
            except Killed:
                pass
            except Exception as error:  # a bug of the simulator, or a thread that let an error go: the run is over
                if self.problem is None:
                    self.problem = error
            task.is_over = True
            process.tasks.remove(task)
            for other in task.after:
                self.wake(other)
            self._hand_over()

        _thread.start_new_thread(run, ())  # ``threading.Thread`` waits until the thread has begun, which takes longer
        self._ready.append(task)
        return task

    def _new(self, process: Process, name: str) -> Task:
        task = Task(self._tasks, name, process)
        self._tasks += 1
        process.tasks.append(task)
        return task

    def check(self) -> None:
        """Raise ``Killed`` where the current thread's process is dead."""
        if self.current.process.is_dead:
            raise Killed

    def block(self, why: str, until_s: float | None = None) -> bool:
        """Let others go on until somebody calls ``wake`` for this thread, or until this moment; whether somebody did.

        In the first thread it raises ``problem``, if there is one.
        """
        task = self.current
        self.check()
        task.waits_for = why
        task.turn += 1
        task.is_woken = False
        if until_s is not None:
            turn = task.turn
            self.at(until_s, lambda: self._time_out(task, turn))
        self._give_baton(task)
        if task is self.first and self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem
        self.check()
        return task.is_woken

    def pause(self) -> None:
        """Let others go on who can; this thread can too."""
        task = self.current
        self.check()
        task.turn += 1
        self._ready.append(task)
        self._give_baton(task)
        self.check()

    def wake(self, task: Task) -> None:
        """Have a blocked thread go on. May be called more than once, and for one that is not blocked."""
        if task is not self.current and task not in self._ready and not task.is_over:
            task.is_woken = True
            self._ready.append(task)

    def join(self, task: Task, until_s: float | None) -> None:
        """Return once the thread has ended, or at this moment."""
        while not task.is_over and (until_s is None or self.now_s < until_s):
            task.after.append(self.current)
            self.block(f"the end of {task.process.name}/{task.name}", until_s)

    def _time_out(self, task: Task, turn: int) -> None:
        if task.turn == turn and task not in self._ready and not task.is_over and task is not self.current:
            self._ready.append(task)

    def _give_baton(self, task: Task) -> None:
        self.current = self._nobody
        chosen = self.current = self._choose()
        if chosen is not task:
            chosen.baton.release()
            task.baton.acquire()

    def _hand_over(self) -> None:
        """From a thread that has ended."""
        self.current = self._nobody
        chosen = self.current = self._choose()
        chosen.baton.release()

    def _choose(self) -> Task:
        while True:
            if self.problem is not None and not self.first.is_over:
                if self.first in self._ready:
                    self._ready.remove(self.first)
                return self.first
            able = [t for t in self._ready if t.process.is_dead or not t.process.is_stopped]
            if able:
                able.sort(key=lambda t: t.number)
                chosen = able[int(self.chance.random() * len(able))] if len(able) > 1 else able[0]
                self._ready.remove(chosen)
                self.turns += 1
                self._since_event += 1
                if self._since_event > _STEPS_AT_ONCE_MAX:
                    self._since_event = 0
                    self.problem = Stuck(f"at {self.now_s:.3f} s threads go round without a wait: {self.describe()}")
                    continue
                self.now_s += _STEP_S
                self.trace = zlib.crc32(struct.pack("<Id", chosen.number, self.now_s), self.trace)
                return chosen
            if not self._timers:
                self.problem = Stuck(f"at {self.now_s:.3f} s nothing can happen any more: {self.describe()}")
                continue
            at_s, _, call = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, at_s)
            self._since_event = 0
            call()

    # -- events ----------------------------------------------------------------------------------------

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        """Have something done at a moment; it must not block."""
        self._timer_number += 1
        heapq.heappush(self._timers, (at_s, self._timer_number, call))

    def note(self, text: str) -> None:
        """Make this part of the trace."""
        self.trace = zlib.crc32(text.encode(), self.trace)

    # -- processes -------------------------------------------------------------------------------------

    def kill(self, process: Process, exit_code: int) -> None:
        """End a process at once. In a thread of its own the caller raises ``Killed`` next, by ``check``."""
        if process.is_dead:
            return
        process.is_dead = True
        process.exit_code = exit_code
        for call in process.at_death:
            call()
        for task in process.tasks:
            if task is not self.current and task not in self._ready:
                self._ready.append(task)

    def stop(self, process: Process, *, stopped: bool) -> None:
        """SIGSTOP and SIGCONT."""
        process.is_stopped = stopped

    def clear(self, processes: list[Process]) -> None:
        """At the end of a run, in the first thread: have all threads of these processes end."""
        for process in processes:
            self.kill(process, -1)
        while any(process.tasks for process in processes):
            with suppress(Exception):
                self.pause()

    def describe(self) -> str:
        """Who waits for what."""
        tasks = [t for t in self._all() if not t.is_over]
        return "; ".join(f"{t.process.name}/{t.name}: {t.waits_for}" for t in tasks[:40])

    def _all(self) -> list[Task]:
        found = {t.number: t for process in (*self.processes, self.root) for t in process.tasks}
        return [found[n] for n in sorted(found)]

    processes: tuple[Process, ...] = ()
    """Those that live, for ``describe``."""
