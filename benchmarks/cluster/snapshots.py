# SPDX-License-Identifier: Apache-2.0
"""Snapshots of one machine's ranks, under the product's policies.

The product's ``Scheduler``, its gate and its recorder run as they are, with the simulation's clock and a condition that
does not block: where the gate would wait, the process that sends waits in its place. Sizes move by ``Sizes``, contents
have the bytes that ``costs`` says, arenas have the slots that ``budget`` says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, cast

import simpy

from benchmarks.cluster.resources import Shared, Waiting
from megatron_moetion.config import MoetionConfig
from megatron_moetion.plan.costs import Cost, RankState, cost_of_exact, cost_of_full, cost_of_popularity
from megatron_moetion.schedule.pace import REMEMBERED, spread_s, spread_share
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.schedule.sizes import Sizes
from megatron_moetion.schedule.timeline import Lane
from megatron_moetion.select.budget import Limits, experts_per_snapshot, full_copies
from megatron_moetion.units import Unit, UnitKind

EAGER_SLICE_BYTES = 8 << 20
SLOTS = full_copies((Unit(name="state", kind=UnitKind.HOST, regions=(), reserved_bytes=1),))["state"]
"""Captures that an arena has room for: the stable one, and those that are on their way to become it."""


class SimulatedClock:
    """The simulation's time."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env

    def monotonic(self) -> float:
        """See ``Clock``."""
        return float(self._env.now)

    def unix_ns(self) -> int:
        """See ``Clock``."""
        return int(self._env.now * 1e9)

    def sleep(self, seconds: float) -> None:
        """Nothing that runs here may block."""
        raise AssertionError("nothing sleeps in the simulation")


class Held(Exception):
    """A gate would wait, for so many seconds or until something changes."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Changes:
    """In place of a ``threading.Condition``: a wait is an exception, and a notification an event."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.event = env.event()

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc: object) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        """See ``threading.Condition``."""
        raise Held(timeout)

    def notify_all(self) -> None:
        """See ``threading.Condition``."""
        before, self.event = self.event, self._env.event()
        before.succeed()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Of a run: mode, schedule, and what they go by."""

    mode: str
    schedule: str
    state: RankState
    period: int = 0
    """Iterations; of mode ``exact``."""
    config: MoetionConfig = field(default_factory=MoetionConfig)

    @cached_property
    def limits(self) -> Limits:
        """K of mode ``popularity``."""
        return experts_per_snapshot(self.config, self.state.num_experts)

    def snapshot_bytes(self, experts: int) -> float:
        """Of one rank; ``experts`` matters in mode ``popularity``."""
        return _cost(self.mode, self.state, self.period, replace(self.limits, usual=experts)).snapshot_bytes

    @property
    def cost(self) -> Cost:
        """What the mode takes."""
        return _cost(self.mode, self.state, self.period, self.limits)


@cache
def _cost(mode: str, state: RankState, period: int, limits: Limits) -> Cost:
    match mode:
        case "full":
            return cost_of_full(state)
        case "exact":
            return cost_of_exact(state, period)
        case "popularity":
            return cost_of_popularity(state, limits)
    raise ValueError(f"mode {mode!r} is none of full, exact and popularity")


@dataclass(frozen=True, kw_only=True)
class Toll:
    """What snapshots cost on the machine beside the links. Seconds of a processor, of one rank."""

    snapshot_s: float = 0.0
    """Of each snapshot: host state, selection, agreement."""
    byte_s: float = 0.0
    """Of each byte: packed here, sent here, received elsewhere."""
    weight: float = 1.0
    """Of a snapshot's stream on a link, in those of training's messages: a stream that never pauses keeps queues full,
    and a message that comes now and then waits in them."""
    device_bytes_per_s: float | None = None
    """Of a rank's link from device to host; None: there is no device."""


@dataclass
class Fates:
    """Of one machine's snapshots."""

    whole_s: dict[int, float] = field(default_factory=dict)
    """Iterations that are whole here and on the holder, and since when."""
    dropped: dict[int, str] = field(default_factory=dict)
    sent_bytes: float = 0.0
    """Of one rank."""
    packed_bytes: float = 0.0
    waited_s: float = 0.0
    """That training waited for snapshots."""


class Ranks:
    """The snapshots of one machine's ranks; a ``Watcher``. All machines share ``agreement``."""

    def __init__(
        self,
        env: simpy.Environment,
        policy: Policy,
        toll: Toll,
        agreement: Agreement,
        link: Shared,
        processor: Shared,
        ranks: int,
    ) -> None:
        self._env, self._policy, self._toll, self._agreement = env, policy, toll, agreement
        self._link, self._processor, self._ranks = link, processor, ranks
        self._clock = SimulatedClock(env)
        self._changes = Changes(env)
        self._mode_waits = policy.mode == "exact"
        self.scheduler = Scheduler(
            policy.schedule,
            HostStopwatch(self._clock),
            clock=self._clock,
            condition=cast(threading.Condition, self._changes),
            eager_slice_bytes=EAGER_SLICE_BYTES,
            draw=no_drawing,
            is_waited_for=self._mode_waits,
            packing_share=spread_share(policy.state.replicas) if toll.device_bytes_per_s else 0.0,
        )
        limits = policy.limits if policy.mode == "popularity" else Limits(fewest=0, usual=0, most=0)
        self._sizes = Sizes(limits.fewest, limits.usual)
        self._times_s: deque[float] = deque(maxlen=REMEMBERED)
        self._submitted_s = env.now
        self._packing: simpy.Event | None = None
        self._queue: deque[tuple[int, float]] = deque()
        self._packed = 0
        self._there_is_work = env.event()
        self._arrived = env.event()
        self._urgent = False
        self._device = Shared(env, toll.device_bytes_per_s * ranks) if toll.device_bytes_per_s else None
        self.fates = Fates()
        agreement.members.append(self)
        env.process(self._send_all())

    # -- Watcher ---------------------------------------------------------------------------------------

    def begins(self, lane: Lane, nbytes: float) -> Callable[[bool], None]:
        """See ``Watcher``."""
        recorder = self.scheduler.recorder
        span = recorder.begin(lane, int(nbytes), int(nbytes))
        is_pipeline = lane is Lane.PIPELINE

        def tell(over: bool) -> None:
            if over:
                recorder.end(span)
            elif is_pipeline:
                recorder.accepted(span)

        return tell

    def before_optimizer(self) -> Waiting:
        """See ``Watcher``: a copy that still reads live state is waited for."""
        self._times_s.append(self._env.now - self._submitted_s)
        if self._packing is not None and not self._packing.triggered:
            self._urgent = True
            began = self._env.now
            yield self._packing
            self.fates.waited_s += self._env.now - began
        self._urgent = False

    def on_step_end(self, iteration: int) -> Waiting:
        """See ``Watcher``: the session's order, as far as it takes time."""
        self.scheduler.cut(iteration)
        self.scheduler.learn(self._link.capacity / self._ranks)
        if self._mode_waits and len(self._queue) > 1:
            began = self._env.now
            limit = self._env.timeout(self._policy.config.max_stall_ms / 1e3)
            with self.scheduler.urgent():
                while len(self._queue) > 1 and not limit.processed:
                    yield self._arrived | limit
            self.fates.waited_s += self._env.now - began
        stable = self._agreement.heard(iteration)
        carried = self.scheduler.carries(self._policy.state.replicas)
        mask, _ = self._sizes.vote(carried.nbytes, self._policy.snapshot_bytes)
        self._agreement.vote(iteration, mask)
        held = 1 + sum(i > stable for i in self.fates.whole_s) + len(self._queue)
        if not self._mode_waits and self._sizes.skips(iteration):
            self.fates.dropped[iteration] = "budget"
        elif not self._mode_waits and held >= SLOTS:  # mode exact waits instead, and has slots for a period
            self.fates.dropped[iteration] = "no-slot"
        else:
            self._submitted_s = self._env.now
            nbytes = self._policy.snapshot_bytes(self._sizes.now.experts)
            self._packing = self._env.process(self._pack(iteration, nbytes))
        yield from ()

    def settle(self, votes: int) -> None:
        """All ranks' votes of a round are known."""
        if not self._mode_waits:
            self._sizes.agree(votes)

    # -- packing and sending ---------------------------------------------------------------------------

    def _pack(self, iteration: int, nbytes: float) -> Waiting:
        self._queue.append((iteration, nbytes))
        yield self._processor.use(self._toll.snapshot_s, self._ranks)
        if self._device is not None:
            paced_s = spread_s(tuple(self._times_s), spread_share(self._policy.state.replicas))
            began = self._env.now
            yield self._device.use(nbytes, self._ranks)
            left_s = paced_s - (self._env.now - began)
            if left_s > 0 and not self._urgent:
                yield self._env.timeout(left_s)
        self.fates.packed_bytes += nbytes
        self._packed = iteration
        if not self._there_is_work.triggered:
            self._there_is_work.succeed()

    def _send_all(self) -> Waiting:
        """The sending thread."""
        while True:
            yield self._there_is_work
            self._there_is_work = self._env.event()
            while self._queue and self._queue[0][0] <= self._packed:
                iteration, nbytes = self._queue[0]
                if self._policy.state.replicas:
                    yield from self._send(nbytes)
                self._queue.popleft()
                self.fates.whole_s[iteration] = self._env.now
                before, self._arrived = self._arrived, self._env.event()
                before.succeed()

    def _send(self, nbytes: float) -> Waiting:
        gate, total = self.scheduler.gate, int(nbytes) * self._policy.state.replicas
        with self.scheduler.transfer(total):
            left = total
            while left > 0:
                slice_bytes = min(left, gate.slice_bytes())
                yield from self._admit(gate, slice_bytes)
                posted_s = self._env.now
                work = self._processor.use(slice_bytes * self._toll.byte_s, self._ranks)
                yield self._link.use(slice_bytes / self._toll.weight, self._ranks * self._toll.weight) & work
                gate.left(slice_bytes, posted_s)
                left -= slice_bytes
                self.fates.sent_bytes += slice_bytes

    def _admit(self, gate: Any, nbytes: int) -> Waiting:
        while True:
            try:
                gate.admit(nbytes)
                return
            except Held as held:
                changed = self._changes.event
                if held.seconds is None or held.seconds == float("inf"):
                    yield changed
                else:
                    yield changed | self._env.timeout(held.seconds)


class Agreement:
    """What all machines know: T, whole on each of them and read one iteration late, and sizes that all can afford."""

    def __init__(self) -> None:
        self.members: list[Ranks] = []
        self._votes: dict[int, list[int]] = {}
        self._seen: dict[int, int] = {}

    def heard(self, iteration: int) -> int:
        """T as a machine learns it at the end of this iteration: as all said it at the end of the one before."""
        if iteration not in self._seen:
            common = set.intersection(*(set(m.fates.whole_s) for m in self.members))
            self._seen[iteration] = max(common, default=0)
        return self._seen.get(iteration - 1, 0)

    def vote(self, iteration: int, mask: int) -> None:
        """One machine's vote; with the last one of an iteration all of them move."""
        votes = self._votes.setdefault(iteration, [])
        votes.append(mask)
        if len(votes) == len(self.members):
            common = votes[0]
            for other in votes[1:]:
                common &= other
            for each in self.members:
                each.settle(common)
            del self._votes[iteration]
