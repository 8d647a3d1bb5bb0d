# SPDX-License-Identifier: Apache-2.0
"""What flows share: a link, the processors of a machine, a disk. Events are simpy's."""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from itertools import count
from typing import Any

import simpy

Waiting = Generator[simpy.Event, Any, Any]
"""A process of the simulation."""
_ROUNDING = 1e-12
"""Of the time that has passed: an event this much too early is on time."""


class Shared:
    """Flows share ``capacity`` a second evenly, each stream of them at most ``most_each``.

    A flow may consist of several equal streams: ranks of one machine that do the same at the same time. ``served``
    counts all that has passed.
    """

    def __init__(self, env: simpy.Environment, capacity: float, most_each: float = math.inf) -> None:
        if not capacity > 0:
            raise ValueError(f"a capacity of {capacity} a second; it must be above 0")
        self._env = env
        self.capacity = capacity
        self._most_each = most_each
        self.served = 0.0
        self.busy_s = 0.0
        """Time in which anything flowed."""
        self._streams = 0.0
        self._each = 0.0  # what a stream has been given since the beginning
        self._since = 0.0
        self._flows: list[tuple[float, int, float, simpy.Event]] = []  # ends at, number, streams, its event
        self._numbers = count()
        self._wakes = 0

    def use(self, amount: float, streams: float = 1) -> simpy.Event:
        """An event that comes when each of so many streams has been given ``amount``."""
        done = self._env.event()
        if amount <= 0:
            return done.succeed()
        if math.isinf(self.capacity) and math.isinf(self._most_each):
            self.served += amount * streams
            return done.succeed()
        self._advance()
        heapq.heappush(self._flows, (self._each + amount, next(self._numbers), streams, done))
        self._streams += streams
        self._wake()
        return done

    @property
    def rate(self) -> float:
        """What one stream is given a second now."""
        return min(self.capacity / self._streams, self._most_each)

    def _advance(self) -> None:
        passed_s = self._env.now - self._since
        self._since = self._env.now
        if self._flows:
            given = self.rate * passed_s
            self._each += given
            self.served += given * self._streams
            self.busy_s += passed_s

    def _wake(self) -> None:
        """When the next flow ends, unless another one begins before."""
        self._wakes += 1
        if not self._flows:
            self._each = self._streams = 0.0
            return
        left = max(0.0, self._flows[0][0] - self._each)
        wake = self._env.timeout(left / self.rate, self._wakes)
        assert wake.callbacks is not None
        wake.callbacks.append(self._woken)

    def _woken(self, wake: simpy.Event) -> None:
        if wake.value != self._wakes:
            return
        self._advance()
        reached = self._each + self.rate * _ROUNDING * max(1.0, self._env.now)
        while self._flows and self._flows[0][0] <= reached:
            _, _, streams, done = heapq.heappop(self._flows)
            self._streams -= streams
            done.succeed()
        self._wake()


class Meeting:
    """Lets ``parties`` processes go on together, again and again."""

    def __init__(self, env: simpy.Environment, parties: int) -> None:
        self._env = env
        self._parties = parties
        self._waiting: list[simpy.Event] = []

    def join(self) -> simpy.Event:
        """An event that comes when all have joined."""
        arrived = self._env.event()
        self._waiting.append(arrived)
        if len(self._waiting) == self._parties:
            waiting, self._waiting = self._waiting, []
            for event in waiting:
                event.succeed()
        return arrived
