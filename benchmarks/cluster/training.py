# SPDX-License-Identifier: Apache-2.0
"""Training as processes: pipeline stages in the order of 1F1B, or one stage with all-to-alls; and the optimizer's step.

One machine stands for all that do the same: for a stage of the pipeline, or, without one, for a host that takes part.
Its ranks do the same at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import simpy

from benchmarks.cluster.resources import Meeting, Shared, Waiting
from megatron_moetion.schedule.timeline import Lane


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does in an iteration. Seconds are those of a processor that it has to itself."""

    stages: int
    """Of the pipeline; 1: none."""
    micro_batches: int
    forward_s: float
    """Of one micro batch on one stage."""
    backward_s: float
    message_bytes: int = 0
    """What a rank sends to the next stage, and back, for one micro batch."""
    collectives: int = 0
    """All-to-alls of one micro batch between machines, forward and backward each."""
    collective_bytes: float = 0.0
    """What one rank sends over the network in one of them."""
    sync_bytes: float = 0.0
    """What one rank sends over the network at the end of an iteration: gradients and parameters."""
    fixed_s: float = 0.0
    """Optimizer, and all else that there is once an iteration."""

    def __post_init__(self) -> None:
        if self.stages < 1 or self.micro_batches < 1:
            raise ValueError(f"{self.stages} stages and {self.micro_batches} micro batches; there must be one of each")
        if self.stages > 1 and self.collectives:
            raise ValueError("all-to-alls between machines are modelled without a pipeline only")


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines and what they share. A cluster's machines have processors of their own."""

    machines: int
    ranks: int
    """Of one machine."""
    processors: int | None
    """Of all machines together, as on emulated hosts; None: each rank computes for itself."""
    link_bytes_per_s: float
    """Of one machine, in each direction; infinite where nothing limits it."""
    latency_s: float = 0.0
    """Of one message or collective."""


class Watcher(Protocol):
    """What hears of a machine's training: the snapshots of its ranks."""

    def begins(self, lane: Lane, nbytes: float) -> Callable[[bool], None]:
        """A rank sends so many bytes. Call the result with False once the network has them, with True at the end."""
        ...

    def before_optimizer(self) -> Waiting:
        """Training is about to change the state."""
        ...

    def on_step_end(self, iteration: int) -> Waiting:
        """The optimizer's step is over."""
        ...


class Unwatched:
    """No snapshots."""

    def begins(self, lane: Lane, nbytes: float) -> Callable[[bool], None]:
        """See ``Watcher``."""
        return lambda over: None

    def before_optimizer(self) -> Waiting:
        """See ``Watcher``."""
        yield from ()

    def on_step_end(self, iteration: int) -> Waiting:
        """See ``Watcher``."""
        yield from ()


class _Channel:
    """Messages from one stage to another. One is on its way when both ends have asked for it."""

    def __init__(self, env: simpy.Environment, link: Shared, world: Machines, nbytes: float) -> None:
        self._env, self._link, self._world, self._nbytes = env, link, world, nbytes
        self._ends: dict[tuple[str, int], simpy.Event] = {}
        self._left: dict[int, simpy.Event] = {}

    def _end(self, which: str, number: int) -> simpy.Event:
        return self._ends.setdefault((which, number), self._env.event())

    def _over(self, number: int) -> simpy.Event:
        return self._left.setdefault(number, self._env.event())

    def send(self, number: int) -> simpy.Event:
        self._end("send", number).succeed()
        self._env.process(self._carry(number))
        return self._over(number)

    def receive(self, number: int) -> simpy.Event:
        self._end("receive", number).succeed()
        return self._over(number)

    def _carry(self, number: int) -> Waiting:
        yield self._end("send", number) & self._end("receive", number)
        if self._world.latency_s:
            yield self._env.timeout(self._world.latency_s)
        yield self._link.use(self._nbytes, self._world.ranks)
        self._over(number).succeed()


class Cluster:
    """The machines of one pipeline, or of one set of expert ranks, with their resources. Make it, then ``train``."""

    def __init__(self, env: simpy.Environment, world: Machines, work: Work) -> None:
        if work.stages > 1 and world.machines != work.stages:
            raise ValueError(f"{work.stages} stages on {world.machines} machines; each stage is a machine here")
        self.env, self.world, self.work = env, world, work
        self.links = [Shared(env, world.link_bytes_per_s) for _ in range(world.machines)]
        """What each machine sends over."""
        shared = Shared(env, world.processors, 1.0) if world.processors is not None else None
        self.processors = [shared or Shared(env, float(world.ranks), 1.0) for _ in range(world.machines)]
        last = world.machines - 1
        nbytes = float(work.message_bytes)
        self._forward = [_Channel(env, self.links[s], world, nbytes) for s in range(last)]
        self._backward = [_Channel(env, self.links[s + 1], world, nbytes) for s in range(last)]
        self._steps = Meeting(env, world.machines)
        self._collectives = Meeting(env, world.machines)
        self.ends_s: list[float] = []
        """When iterations were over, by number."""

    def train(self, watchers: list[Watcher], iterations: int) -> None:
        """Run so many iterations more; ``ends_s`` grows by as many."""
        begun = len(self.ends_s)
        machines = [
            self.env.process(self._machine(number, watcher, begun, iterations))
            for number, watcher in enumerate(watchers)
        ]
        self.env.run(self.env.all_of(machines))

    def _machine(self, number: int, watcher: Watcher, begun: int, iterations: int) -> Waiting:
        for iteration in range(begun + 1, begun + iterations + 1):
            yield from self._passes(number if self.work.stages > 1 else 0, number, watcher, iteration)
            yield from self._collective(number, watcher, Lane.GRADIENT, self.work.sync_bytes)
            yield from watcher.before_optimizer()
            yield self._compute(number, self.work.fixed_s)
            yield self._steps.join()
            if number == 0:
                self.ends_s.append(self.env.now)
            yield from watcher.on_step_end(iteration)

    def _compute(self, number: int, seconds: float) -> simpy.Event:
        return self.processors[number].use(seconds, self.world.ranks)

    def _passes(self, stage: int, machine: int, watcher: Watcher, iteration: int) -> Waiting:
        """Forward and backward passes of one iteration on one stage, as Megatron's schedule without interleaving."""
        work = self.work
        total, first = work.micro_batches, (iteration - 1) * work.micro_batches
        warm_up = min(work.stages - 1 - stage, total)
        has_next, has_previous = stage < work.stages - 1, stage > 0

        def exchange(sent: list[tuple[_Channel, int]], received: list[tuple[_Channel, int]]) -> Waiting:
            if not sent and not received:
                return
            tell = watcher.begins(Lane.PIPELINE, len(sent) * work.message_bytes) if sent else None
            waits = [channel.receive(first + m) for channel, m in received]
            sends = [channel.send(first + m) for channel, m in sent]
            if sends:
                yield self.env.all_of(sends)
            if tell is not None:
                tell(False)
            if waits:
                yield self.env.all_of(waits)
            if tell is not None:
                tell(True)

        def forward() -> Waiting:
            yield from self._pass(machine, watcher, work.forward_s)

        def backward() -> Waiting:
            yield from self._pass(machine, watcher, work.backward_s)

        to_next = [self._forward[stage]] if has_next else []
        from_next = [self._backward[stage]] if has_next else []
        from_previous = [self._forward[stage - 1]] if has_previous else []
        to_previous = [self._backward[stage - 1]] if has_previous else []
        for m in range(warm_up):
            yield from exchange([], [(c, m) for c in from_previous])
            yield from forward()
            yield from exchange([(c, m) for c in to_next], [])
        steady = total - warm_up
        if steady:
            yield from exchange([], [(c, warm_up) for c in from_previous])
        for i in range(steady):
            yield from forward()
            yield from exchange([(c, warm_up + i) for c in to_next], [(c, i) for c in from_next])
            yield from backward()
            more = [(c, warm_up + i + 1) for c in from_previous] if i < steady - 1 else []
            yield from exchange([(c, i) for c in to_previous], more)
        for m in range(steady, total):
            yield from exchange([], [(c, m) for c in from_next])
            yield from backward()
            yield from exchange([(c, m) for c in to_previous], [])

    def _pass(self, number: int, watcher: Watcher, seconds: float) -> Waiting:
        """One micro batch in one direction: computing, with all-to-alls between."""
        pieces = self.work.collectives + 1
        for piece in range(pieces):
            yield self._compute(number, seconds / pieces)
            if piece < pieces - 1:
                yield from self._collective(number, watcher, Lane.ALL_TO_ALL, self.work.collective_bytes)

    def _collective(self, number: int, watcher: Watcher, lane: Lane, nbytes: float) -> Waiting:
        if not nbytes:
            return
        tell = watcher.begins(lane, nbytes)
        yield self._collectives.join()
        if self.world.latency_s:
            yield self.env.timeout(self.world.latency_s)
        yield self.links[number].use(nbytes, self.world.ranks)
        yield self._collectives.join()
        tell(True)
