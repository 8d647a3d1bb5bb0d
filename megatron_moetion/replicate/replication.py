# SPDX-License-Identifier: Apache-2.0
"""One rank's replication: a link to each of its holders, and what its arena is worth because of them.

A holder that stays away costs its owner a copy, and no more: snapshots go on being whole with the copies that there
are, other nodes are asked for room, and the holder is taken back when it lacks one snapshot at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from megatron_moetion.clock import Clock
from megatron_moetion.coding import Part
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.replicate.channel import Mesh
from megatron_moetion.replicate.holder import Holder
from megatron_moetion.replicate.link import Link, LinkState, Pacing, Timing, Turns
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.replicate.substitutes import substitutes_of
from megatron_moetion.replicate.worker import Threads, Worker
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena

ATTEMPTS_WAITED_FOR = 3
"""``drain`` waits for a link that fails until it has failed so often: the last bytes of a run are worth a few tries."""
_REMARKS_MAX = 16


@dataclass(frozen=True, kw_only=True)
class HolderState:
    """One holder of this rank's state, for people and dashboards."""

    rank: int
    node: int
    is_active: bool
    """Whether snapshots count as whole only when they are there."""
    is_up: bool
    behind: int
    """Snapshots that it lacks."""
    failures: int
    problem: str | None


@dataclass
class _Seat:
    """The place of one holder. ``holder``: whose copy counts, None while nobody's does."""

    home: int
    part: Part
    """What it keeps of each capture."""
    holder: int | None
    candidate: int | None = None
    to_ask: deque[int] = field(default_factory=deque)


@dataclass
class _Watch:
    """How long a holder has taken nothing, in snapshots and since when (monotonic clock).

    ``updates``: that it had acknowledged then. ``has_taken``: whether it has acknowledged any since it is watched.
    """

    since_s: float
    updates: int
    has_taken: bool = False
    snapshots: int = 0

    def is_taking(self, updates: int, patience: int) -> bool:
        """Whether the last thing that it has acknowledged, of so many, is not long ago."""
        return updates != self.updates or (self.has_taken and self.snapshots < patience)


class Replication:
    """Keeps mirrors of this rank's arena on other nodes. The packing thread calls ``offer``, the others may be called
    from any thread.

    ``patience``: snapshots until a holder that takes nothing is done without. ``timing``: of links. Takes over
    ``holder``, this rank's other half. ``timeout_s``: see ``drain``.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        own: Arena,
        holder: Holder,
        placement: Placement,
        pool: HostPool,
        probe: Callable[[str, int], None],
        pacing: Pacing,
        patience: int,
        timeout_s: float,
        clock: Clock,
        threads: Threads,
        timing: Timing | None = None,
    ) -> None:
        rank = mesh.rank
        self._mesh = mesh
        self._own = own
        self._holder = holder
        self._placement = placement
        self._coding = placement.coding
        self._pool = pool
        self._probe = probe
        self._patience = patience
        self._timeout_s = timeout_s
        self._clock = clock
        self._threads = threads
        self._timing = timing if timing is not None else Timing(answer_s=timeout_s)
        self._turns = Turns(pacing, len(placement.holders[rank]), threads.lock())
        self._substitutes = substitutes_of(rank, placement)
        self._changed = threads.condition()
        self._links: dict[int, Link] = {}
        self._workers: dict[int, Worker] = {}
        self._runs: list[Future[None]] = []
        self._watches: dict[int, _Watch] = {}
        seats = zip(placement.holders[rank], placement.parts[rank], strict=True)
        self._seats = [_Seat(home=h, holder=h, part=part) for h, part in seats]
        self._offered: dict[int, int] = {}
        """Recent snapshots of which the arena still lists something, and the page's number when it listed them."""
        self._whole: dict[int, float] = {}
        self._remarks: deque[tuple[str, str]] = deque(maxlen=_REMARKS_MAX)
        self._is_closed = False
        with self._changed:
            for seat in self._seats:
                self._connect(seat.home, seat.part)

    # -- for the pipeline ------------------------------------------------------------------------------

    def offer(self, iteration: int, *, is_there: bool) -> None:
        """The snapshot of ``iteration`` has been committed, or dropped here; the arena may have released others.

        An error in a link's thread that is no fault of a peer is raised here.
        """
        with self._changed:
            self._raise_bugs()
            listed = set(np.unique(self._own.page.records.table["iteration"]).tolist())
            recent = {i: n for i, n in self._offered.items() if i in listed}
            recent |= {iteration: self._own.page.sequence} if is_there else {}
            self._offered = dict(list(recent.items())[-WINDOW:])
            self._lose_patience()
            self._on_news()
            self._changed.notify_all()

    @property
    def whole(self) -> Mapping[int, float]:
        """Recent iterations that all active holders have had, and since when (monotonic clock, seconds)."""
        with self._changed:
            return dict(self._whole)

    def redundancy(self, iteration: int) -> int:
        """Losses of nodes that this iteration survives, with the holders that have it and can be reached now."""
        with self._changed:
            links = [link for link in self._links.values() if not link.is_retired]
            parts = [link.part for link in links if link.state.is_up and iteration in link.state.whole]
            return self._coding.survives(len(set(parts)) if self._coding.is_on else len(parts))

    @property
    def pending(self) -> int:
        """Recent snapshots that some active holder lacks."""
        with self._changed:
            return sum(i not in self._whole for i in self._offered)

    def catch_up(self, timeout_s: float) -> None:
        """Return once no holder that is active and reachable lacks more than one snapshot, or after the timeout."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(self._behind(link.state) < 2 for link in self._active() if link.state.is_up), timeout_s
            )

    def drain(self) -> None:
        """Return once all active holders have everything.

        Does not wait for one whose connections fail again and again, unless it has never been there: ranks of a job do
        not begin at one moment. At most ``timeout_s``.
        """
        self.wait(self._timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """As ``drain``, for at most this long; whether all active holders have everything."""
        with self._changed:
            failures = {rank: link.state.failures for rank, link in self._links.items()}

            def is_done(link: Link) -> bool:
                tries = link.state.failures - failures.get(link.holder, 0)
                is_lost = link.state.was_up and tries >= ATTEMPTS_WAITED_FOR
                return is_lost or not self._behind(link.state)

            self._changed.wait_for(lambda: all(is_done(link) for link in self._active()), timeout_s)
            self._raise_bugs()
            return not any(self._behind(link.state) for link in self._active())

    # -- for people ------------------------------------------------------------------------------------

    def states(self) -> tuple[HolderState, ...]:
        """All holders that there are, those that are tried or asked for room too."""
        with self._changed:
            active = {s.holder for s in self._seats}
            return tuple(
                HolderState(
                    rank=rank,
                    node=self._placement.node_of[rank],
                    is_active=rank in active,
                    is_up=link.state.is_up,
                    behind=self._behind(link.state),
                    failures=link.state.failures,
                    problem=link.state.problem,
                )
                for rank, link in sorted(self._links.items())
            )

    def remarks(self) -> list[tuple[str, str]]:
        """What has changed since the last call that a person should know: a kind and a text each."""
        with self._changed:
            found = list(self._remarks)
            self._remarks.clear()
            return found

    # -- the end ---------------------------------------------------------------------------------------

    def quiet(self) -> AbstractContextManager[bool]:
        """See ``Holder.quiet``."""
        return self._holder.quiet()

    def close(self) -> None:
        """Stop all threads; bounded by the limits of what is under way."""
        self._stop()
        for worker in self._workers.values():
            worker.close()
        self._holder.close()

    def abandon(self) -> None:
        """Stop without waiting for anybody."""
        self._stop()
        for worker in self._workers.values():
            worker.abandon()
        self._holder.abandon()

    def _stop(self) -> None:
        with self._changed:
            self._is_closed = True
            for link in self._links.values():
                link.close()

    # -- links; all with ``_changed`` held -------------------------------------------------------------

    def _raise_bugs(self) -> None:
        """Faults are handled where they happen; an error that ends a link's thread is a bug, and must show."""
        for run in [r for r in self._runs if r.done()]:
            self._runs.remove(run)
            if not run.cancelled():  # else it had not begun when all was closed
                run.result()

    def _active(self) -> list[Link]:
        return [self._links[s.holder] for s in self._seats if s.holder is not None]

    def _behind(self, state: LinkState) -> int:
        """Snapshots that a holder lacks."""
        return sum(
            i not in state.whole and (i in state.lacking or state.looked < number)
            for i, number in self._offered.items()
        )

    def _may_count(self, rank: int | None) -> bool:
        """Whether snapshots may wait for a holder: it has everything, or it takes snapshots and lacks only one.

        A holder on a slow link always lacks the last one, unless snapshots wait for it. One that was done without has
        to take something first: what is known of one that does not answer is old.
        """
        if rank is None or rank not in self._links:
            return False
        state, behind = self._links[rank].state, self._behind(self._links[rank].state)
        lacks_one = state.taken > 0 and len(state.lacking) <= 1 and behind <= 1
        takes = lacks_one and self._watches[rank].is_taking(state.updates, self._patience)
        return state.is_up and (takes or (state.is_level and not behind))

    def _connect(self, rank: int, part: Part) -> None:
        """Have a link to this rank, which keeps this part, and a wanted one."""
        if rank in self._links:
            self._links[rank].keep()
            self._watch(rank)
            return
        link = Link(
            holder=rank,
            mesh=self._mesh,
            own=self._own,
            pool=self._pool,
            probe=self._probe,
            turns=self._turns,
            timing=self._timing,
            changed=self._changed,
            tell=self._on_news,
            part=part,
        )
        self._links[rank] = link
        self._watch(rank)
        if rank not in self._workers:
            self._workers[rank] = self._threads.worker(f"moetion-link-{rank}")
        self._runs.append(self._workers[rank].submit(link.run))

    def _watch(self, rank: int) -> None:
        """Begin to; what it has taken before does not count."""
        self._watches[rank] = _Watch(since_s=self._clock.monotonic(), updates=self._links[rank].state.updates)

    def _lose_patience(self) -> None:
        """One more snapshot has come."""
        now = self._clock.monotonic()
        for seat in self._seats:
            for rank in _ranks(seat.home if seat.holder is None else seat.holder, seat.candidate):
                watch, state = self._watches[rank], self._links[rank].state
                if state.updates != watch.updates or (state.is_level and not self._behind(state)):
                    has_taken = watch.has_taken or state.updates != watch.updates
                    self._watches[rank] = _Watch(since_s=now, updates=state.updates, has_taken=has_taken)
                elif not state.is_waiting:  # another holder takes its time, not this one
                    watch.snapshots += 1
            if seat.holder is not None and self._is_away(seat.holder, now):
                self._do_without(seat, seat.holder)
            elif seat.candidate is not None and self._is_away(seat.candidate, now):
                self._ask_next(seat, f"does not get on: {self._links[seat.candidate].state.problem}")

    def _is_away(self, rank: int, now: float) -> bool:
        watch = self._watches[rank]
        return watch.snapshots >= self._patience and now - watch.since_s >= self._timing.away_s

    def _on_news(self) -> None:
        """The state of some link has changed, or a snapshot has come."""
        if self._is_closed:
            return
        self._forget_ended()
        for seat in self._seats:
            if seat.holder is None:
                self._fill(seat)
        states = [link.state for link in self._active()]
        for iteration in self._offered:
            if iteration not in self._whole and all(iteration in s.whole for s in states):
                self._whole[iteration] = self._clock.monotonic()
        while len(self._whole) > WINDOW:
            del self._whole[min(self._whole)]

    def _forget_ended(self) -> None:
        """Remove links whose holders have given their mirrors up; of one that is wanted again make another."""
        for rank in [r for r, link in self._links.items() if link.state.has_ended]:
            ended = self._links.pop(rank)
            if not ended.is_retired:
                self._connect(rank, ended.part)

    # -- seats; all with ``_changed`` held -------------------------------------------------------------

    def _do_without(self, seat: _Seat, rank: int) -> None:
        """The active holder stays away: go on with one copy fewer, and look for another holder."""
        seat.holder = None
        self._watch(rank)
        problem = self._links[rank].state.problem or "it takes nothing"
        self._say(
            "holder-away",
            f"{self._name(rank)} has taken no snapshot of this rank for {self._patience} ({problem}); snapshots count "
            f"as whole without it, {self._exposure()}",
        )
        if rank != seat.home:
            self._links[rank].retire()
            self._connect(seat.home, seat.part)
        seat.to_ask = deque(s for s in self._substitutes if s != rank)
        self._ask_next(seat)

    def _ask_next(self, seat: _Seat, problem: str | None = None) -> None:
        """Ask the next rank for room. ``problem``: why the last one is no holder."""
        if seat.candidate is not None:
            self._links[seat.candidate].retire()
            self._say("substitute", f"{self._name(seat.candidate)} cannot hold this rank's snapshots: it {problem}")
        seat.candidate = None
        in_use = {r for r, link in self._links.items() if not link.is_retired or link.part != seat.part}
        while seat.to_ask and seat.candidate is None:
            rank = seat.to_ask.popleft()
            if rank not in in_use:
                self._connect(rank, seat.part)
                seat.candidate = rank
        if seat.candidate is None:
            self._say(
                "no-substitute",
                f"no other node holds this rank's snapshots in place of {self._name(seat.home)}, {self._exposure()}; "
                f"they are replicated there again when it can be reached",
            )

    def _fill(self, seat: _Seat) -> None:
        """Take a holder that snapshots may wait for."""
        for rank in (seat.home, seat.candidate):
            if rank is not None and self._may_count(rank):
                seat.holder = rank
                for other in _ranks(seat.home, seat.candidate) - {rank}:
                    self._links[other].retire()
                seat.candidate = None
                seat.to_ask.clear()
                self._watch(rank)
                self._say("holder", f"{self._name(rank)} has all of this rank's snapshots from now on")
                return
        if seat.candidate is not None and (refusal := self._links[seat.candidate].state.refusal) is not None:
            self._ask_next(seat, f"says {refusal}")

    def _name(self, rank: int) -> str:
        return f"rank {rank} (node {self._placement.node_of[rank]})"

    def _exposure(self) -> str:
        """What losses of nodes would now cost."""
        holders = [s.holder for s in self._seats if s.holder is not None]
        nodes = [self._placement.node_of[r] for r in (self._mesh.rank, *holders)]
        if self._coding.is_on and len(nodes) > 1:
            lost = max(1, len(holders) - self._coding.data + 2)
            others = f" and of {lost - 1} of nodes {', '.join(map(str, nodes[1:]))} with it" if lost > 1 else " alone"
            return f"and the loss of node {nodes[0]}{others} would cost all that is in memory"
        if len(nodes) == 1:
            return f"and the loss of node {nodes[0]} alone would cost all that is in memory"
        return f"and the loss of nodes {', '.join(map(str, nodes))} together would cost all that is in memory"

    def _say(self, kind: str, text: str) -> None:
        self._remarks.append((kind, text))


def _ranks(*maybe: int | None) -> set[int]:
    return {rank for rank in maybe if rank is not None}
