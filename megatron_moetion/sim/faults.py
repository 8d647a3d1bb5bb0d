# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a simulated run: a list of faults, each at a virtual moment, drawn from a seed or written down."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ChannelError
from megatron_moetion.sim.cluster import KILLED, Cluster, Rank, Shape
from megatron_moetion.sim.memory import Machine, flip, tear

if TYPE_CHECKING:
    from megatron_moetion.sim.run import Referee

POINTS = (
    "survey", "fetch", "restore", "restored", "before-select", "mid-pack", "before-commit", "mid-replication",
    "held-dropped", "held-received", "held-listed",
)  # fmt: skip
"""Where a process can be killed, beside at any moment."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong. What the numbers mean is said where the kind is carried out."""

    at_s: float
    kind: str
    rank: int = 0
    other: int = 0
    seconds: float = 0.0
    point: str = ""
    amount: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kind} at {self.at_s:.3f} s, rank or node {self.rank}"]
        parts += [f"other {self.other}"] if self.other else []
        parts += [f"for {self.seconds:.3f} s"] if self.seconds else []
        parts += [f"at {self.point}"] if self.point else []
        parts += [f"amount {self.amount}"] if self.amount else []
        return ", ".join(parts)


SETTLING_S = 15.0
"""From the end of the last fault until nothing may be seen of it any more, beyond what the calm iterations allow."""
CALM_ITERATIONS = 30
KINDS = {
    "kill": 10, "kill-at": 12, "kill-in-page": 4, "kill-all": 2, "lose-node": 5, "lose-in-recovery": 3, "swap-node": 2,
    "return-node": 2, "flap-node": 3, "cut-then-lose": 4,
    "stop": 4, "slow": 3, "cut": 6, "cut-one-way": 3, "isolate": 3, "delay": 8, "reset": 14, "damage": 10, "drop": 8,
    "double": 8, "flip": 4, "fill": 3, "delete-store": 2, "clock": 3, "move": 3, "settings": 3, "late-pack": 6,
    "moved": 4, "grown": 3, "unhealthy": 3, "lose-domain": 10,
}  # fmt: skip
"""Kinds of faults, and how often each is drawn."""


def draw(seed: int, shape: Shape, count: int, *, kinds: Sequence[str] = ()) -> list[Fault]:
    """So many faults, in order, over as long as training about takes. No kinds named: all that the shape can have."""
    kinds = kinds or [kind for kind in KINDS if shape.domains or kind != "lose-domain"]
    chance = random.Random(seed ^ 0x5EED)
    span_s = shape.iterations * shape.step_s * 1.3
    weights = [KINDS[kind] for kind in kinds]
    found = []
    for _ in range(count):
        kind = chance.choices(kinds, weights)[0]
        is_by_rank = kind in (
            "kill",
            "kill-at",
            "kill-in-page",
            "kill-all",
            "stop",
            "slow",
            "late-pack",
            "moved",
            "grown",
            "unhealthy",
        )
        most = shape.ranks if is_by_rank else shape.nodes
        found.append(
            Fault(
                at_s=round(chance.uniform(0.0, span_s), 4),
                kind=kind,
                rank=chance.randrange(most),
                other=chance.randrange(most),
                seconds=round(chance.choice((0.05, 0.3, 1.0, 3.0, 8.0, 14.0)) * chance.uniform(0.5, 1.5), 4),
                point=chance.choice(POINTS) if kind == "kill-at" else "",
                amount=chance.randrange(1, 6),
            )
        )
    early = random.Random(seed ^ 0xEA21)
    if found and early.random() < 0.2:  # before there is a first snapshot
        found[0] = replace(found[0], at_s=round(early.uniform(0.0, 0.08), 4))
    return sorted(found, key=lambda fault: (fault.at_s, fault.kind))


class Injector:
    """Carries faults out. ``counts``: those that took place, by kind."""

    def __init__(self, cluster: Cluster, referee: Referee, faults: Sequence[Fault]) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._referee = referee
        self._simulator = cluster.simulator
        self._chance = random.Random(len(faults) * 31 + cluster.shape.ranks)
        self._is_closed = False
        self._armed: list[Fault] = []
        self._messages: list[Fault] = []
        self._at_launch: list[Callable[[], None]] = []
        self._away: list[tuple[Machine, tuple[bytes, ...]]] = []
        """Nodes that were taken out, and the history up to what was stable then."""
        self._off: dict[int, float] = {}
        """Nodes from and to which no snapshots get through, and until when."""
        self._restores: set[tuple[int, int]] = set()
        """Attempts and ranks: those that have come to restore their state."""
        self._skip: dict[tuple[int, int], int] = {}
        self._actions: dict[str, Callable[[Fault], bool]] = {
            "kill": self._kill,
            "kill-at": self._arm,
            "kill-in-page": self._arm,
            "kill-all": self._kill_all,
            "lose-node": self._lose_node,
            "lose-domain": self._lose_domain,
            "lose-in-recovery": self._lose_in_recovery,
            "swap-node": self._swap_node,
            "return-node": self._return_node,
            "flap-node": self._flap_node,
            "cut-then-lose": self._cut_then_lose,
            "stop": self._stop,
            "slow": self._slow,
            "cut": self._cut,
            "cut-one-way": self._cut,
            "isolate": self._isolate,
            "delay": self._delay,
            "reset": self._reset,
            "damage": self._message,
            "drop": self._message,
            "double": self._message,
            "flip": self._flip,
            "fill": self._fill,
            "delete-store": self._delete_store,
            "clock": self._clock,
            "move": self._move,
            "settings": self._settings,
            "late-pack": self._late_pack,
            "moved": self._moved,
            "grown": self._grown,
            "unhealthy": self._unhealthy,
        }
        cluster.probes = self._probe
        cluster.in_page = self._in_page
        cluster.cuts = lambda rank: _Wire(self, rank)
        for fault in faults:
            self._simulator.at(fault.at_s, lambda fault=fault: self._do(fault))  # type: ignore[misc]
        over_s = max((fault.at_s + fault.seconds for fault in faults), default=0.0)
        if faults:
            self._simulator.at(over_s, self._settle)
        self._simulator.at(over_s + (SETTLING_S if faults else 0.0), self._become_calm)

    def close(self) -> None:
        """Do nothing any more."""
        self._is_closed = True

    def before_launch(self) -> None:
        """Between two attempts: nodes are replaced, ranks move, settings change."""
        calls, self._at_launch = self._at_launch, []
        for call in calls:
            call()

    def _do(self, fault: Fault) -> None:
        if self._is_closed:
            return
        if self._actions[fault.kind](fault):
            self._note(fault)

    def _note(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        self._referee.say(str(fault))

    def _settle(self) -> None:
        """Nothing new goes wrong; steps are long, so that few of them are made until all has settled.

        What has waited for its point or its message until now would come too late to be over when all must be well.
        """
        self._armed.clear()
        self._messages.clear()
        self._cluster.step_s = 4 * self._cluster.shape.step_s

    def _become_calm(self) -> None:
        """The last fault is over, and so is what it left: training goes on for so long that all must be well again."""
        if self._is_closed:
            return
        self._cluster.step_s = self._cluster.shape.step_s
        self._referee.say("no fault comes any more")
        self._referee.is_calm = True
        self._cluster.end_after(CALM_ITERATIONS)

    # -- processes -------------------------------------------------------------------------------------

    def _rank(self, number: int) -> Rank | None:
        ranks = self._cluster.ranks
        return ranks[number] if ranks and not ranks[number].process.is_dead else None

    def _end(self, rank: Rank) -> None:
        """SIGKILL; what the process was writing is torn."""
        self._cluster.kill(rank, KILLED)
        for name in sorted(rank.machine.files):
            if rank.process in rank.machine.files[name].users and self._chance.random() < 0.5:
                self.counts["torn"] += tear(rank.machine, name, self._chance)

    def _kill(self, fault: Fault) -> bool:
        rank = self._rank(fault.rank)
        if rank is not None:
            self._end(rank)
        return rank is not None

    def _kill_all(self, fault: Fault) -> bool:
        found = [rank for n in range(self._cluster.shape.ranks) if (rank := self._rank(n)) is not None]
        for rank in found:
            self._end(rank)
        return bool(found)

    def _arm(self, fault: Fault) -> bool:
        self._armed.append(fault)
        return False

    def _probe(self, rank: Rank, point: str, iteration: int) -> None:
        if self._is_closed:
            return
        if point == "restore":
            self._restores.add((rank.attempt, rank.number))
        for fault in self._armed:
            if fault.kind == "kill-at" and (fault.rank, fault.point) == (rank.number, point):
                seen = self._skip[rank.attempt, id(fault)] = self._skip.get((rank.attempt, id(fault)), 0) + 1
                if seen < min(fault.amount, 3):
                    continue
                self._armed.remove(fault)
                self._note(fault)
                self._end(rank)
                self._simulator.check()
        if self._simulator.chance.random() < 0.2:
            self._simulator.pause()

    def _in_page(self, rank: Rank) -> None:
        """A page of an arena is half written: its process may die, and nobody else goes on in between."""
        self._simulator.check()
        for fault in [] if self._is_closed else self._armed:
            if (fault.kind, fault.rank) == ("kill-in-page", rank.number):
                self._armed.remove(fault)
                self._note(fault)
                self._cluster.kill(rank, KILLED)
                self._simulator.check()

    def _stop(self, fault: Fault) -> bool:
        rank = self._rank(fault.rank)
        if rank is None or rank.process.is_stopped:
            return False
        self._simulator.stop(rank.process, stopped=True)
        self._simulator.at(self._simulator.now_s + fault.seconds, lambda: self._go_on(rank))
        return True

    def _go_on(self, rank: Rank) -> None:
        self._simulator.stop(rank.process, stopped=False)

    def _slow(self, fault: Fault) -> bool:
        rank = self._rank(fault.rank)
        if rank is None:
            return False
        until_s = self._simulator.now_s + fault.seconds

        def turn() -> None:
            self._simulator.stop(rank.process, stopped=not rank.process.is_stopped)
            if self._simulator.now_s < until_s or rank.process.is_stopped:
                self._simulator.at(self._simulator.now_s + 0.05, turn)

        turn()
        return True

    # -- nodes -----------------------------------------------------------------------------------------

    def _lose(self, node: int) -> None:
        """The machine of a node of the run is gone, and another one takes its place at the next start."""
        cluster = self._cluster
        machine = cluster.machines[node]
        for rank in cluster.ranks:
            if rank.machine is machine:
                cluster.kill(rank, KILLED)
        machine.lose()
        self._referee.checker.lost(self._simulator.now_s, machine.key, "lost")
        cluster.machines[node] = cluster.new_machine()

    def _lose_node(self, fault: Fault) -> bool:
        self._lose(fault.rank)
        return True

    def _lose_domain(self, fault: Fault) -> bool:
        """All nodes of a failure domain at once."""
        domain = self._cluster.machines[fault.rank].domain
        for node in [n for n, machine in enumerate(self._cluster.machines) if domain and machine.domain == domain]:
            self._lose(node)
        return bool(domain)

    def _lose_in_recovery(self, fault: Fault) -> bool:
        """A node dies, and another one a moment after the next start has begun."""
        self._lose(fault.rank)

        def again() -> None:
            def lose() -> None:
                if not self._is_closed:
                    self._lose(fault.other)
                    self._note(fault)

            self._simulator.at(self._simulator.now_s + 0.01 * fault.seconds, lose)

        self._at_launch.append(again)
        return True

    def _swap_node(self, fault: Fault) -> bool:
        """A node is taken out of the run with all that it holds, as by an operator; it may return."""
        self._away.append((self._cluster.machines[fault.rank], self._referee.checker.stable_history()))
        self._swap_out(fault.rank)
        return True

    def _return_node(self, fault: Fault) -> bool:
        """A node that was taken out is back, with memory as old as then, in the place of another one.

        One of a history that the run has not gone on from stays away: that takes the loss of all later copies before,
        and then memory alone cannot tell which of two histories is the present one.
        """
        if not self._away:
            return False
        old, history = self._away.pop(0)

        def at_launch() -> None:
            if not self._referee.checker.is_past(history):
                return
            machine = self._cluster.machines[fault.rank]
            self._referee.checker.lost(self._simulator.now_s, machine.key, "lost")
            self._cluster.machines[fault.rank] = old

        self._at_launch.append(at_launch)
        return True

    def _flap_node(self, fault: Fault) -> bool:
        """A node leaves, and is back at the start after the next one, which it causes."""
        cluster, checker = self._cluster, self._referee.checker
        machine = cluster.machines[fault.rank]
        history = checker.stable_history()
        self._swap_out(fault.rank)

        def back() -> None:
            if not self._is_closed and checker.is_past(history):
                self._swap_out(fault.rank)
                cluster.machines[fault.rank] = machine

        def at_launch() -> None:
            self._simulator.at(self._simulator.now_s + 0.1 + 0.3 * fault.amount, back)

        self._at_launch.append(at_launch)
        return True

    def _swap_out(self, node: int) -> None:
        cluster = self._cluster
        machine = cluster.machines[node]
        for rank in cluster.ranks:
            if rank.machine is machine:
                self._end(rank)
        self._referee.checker.lost(self._simulator.now_s, machine.key, "lost")
        cluster.machines[node] = cluster.new_machine()

    def _cut_then_lose(self, fault: Fault) -> bool:
        """A node can reach no other one, or its snapshots cannot; a moment later it is gone."""
        if fault.amount % 2:
            self._off[self._cluster.machines[fault.rank].number] = self._simulator.now_s + fault.seconds
        else:
            self._isolate(fault)

        def lose() -> None:
            if not self._is_closed:
                self._lose(fault.rank)

        self._simulator.at(self._simulator.now_s + 0.4 * fault.amount, lose)
        return True

    def _move(self, fault: Fault) -> bool:
        """At the next start ranks are on other nodes."""

        def at_launch() -> None:
            self._chance.shuffle(self._cluster.machines)

        self._at_launch.append(at_launch)
        return True

    def _settings(self, fault: Fault) -> bool:
        """At the next start settings are others."""

        def at_launch() -> None:
            shape, settings = self._cluster.shape, self._cluster.settings
            settings["schedule"] = ("eager", "steady", "bubble")[fault.amount % 3]
            settings["replicas"] = min(fault.other % 3, shape.nodes - 1)
            settings["coding_nodes"] = shape.coding_nodes if settings["replicas"] == shape.replicas else 0
            if shape.mode != "exact":
                settings["interval"] = 1 + fault.amount % 3

        self._at_launch.append(at_launch)
        return True

    # -- memory ----------------------------------------------------------------------------------------

    def _flip(self, fault: Fault) -> bool:
        """Not while bytes that are verified become state: a moment that no promise covers (guarantees, G1)."""
        machine = self._cluster.machines[fault.rank]
        here = {(r.attempt, r.number) for r in self._cluster.ranks if r.machine is machine}
        if not machine.files or here & self._restores - self._referee.begun:
            return False
        name = self._chance.choice(sorted(machine.files))
        flip(machine, name, self._chance)
        self._referee.checker.lost(self._simulator.now_s, machine.key, "damaged")
        return True

    def _fill(self, fault: Fault) -> bool:
        machine = self._cluster.machines[fault.rank]
        machine.is_full = True

        def free() -> None:
            machine.is_full = False

        self._simulator.at(self._simulator.now_s + fault.seconds, free)
        return True

    def _delete_store(self, fault: Fault) -> bool:
        machine = self._cluster.machines[fault.rank]
        machine.delete()
        self._referee.checker.lost(self._simulator.now_s, machine.key, "lost")
        self._referee.checker.deleted.add(machine.key)
        return True

    def _clock(self, fault: Fault) -> bool:
        self._cluster.machines[fault.rank].skew_s += (fault.amount - 3) * 1000 * fault.seconds
        return True

    # -- network ---------------------------------------------------------------------------------------

    def _set_cut(self, pairs: Sequence[tuple[int, int]], seconds: float) -> None:
        network = self._cluster.network
        for source, target in pairs:
            network.cut(source, target, is_cut=True)

        def heal() -> None:
            for source, target in pairs:
                network.cut(source, target, is_cut=False)

        self._simulator.at(self._simulator.now_s + seconds, heal)

    def _two(self, fault: Fault) -> tuple[int, int] | None:
        one, other = (self._cluster.machines[n].number for n in (fault.rank, fault.other))
        return None if one == other else (one, other)

    def _cut(self, fault: Fault) -> bool:
        two = self._two(fault)
        if two is None:
            return False
        ways = [two] if fault.kind == "cut-one-way" else [two, two[::-1]]
        self._set_cut(ways, fault.seconds)
        return True

    def _isolate(self, fault: Fault) -> bool:
        one = self._cluster.machines[fault.rank].number
        others = [m.number for m in self._cluster.machines if m.number != one]
        self._set_cut([pair for o in others for pair in ((one, o), (o, one))], fault.seconds)
        return bool(others)

    def _delay(self, fault: Fault) -> bool:
        two = self._two(fault)
        if two is None:
            return False
        link = self._cluster.network.link(*two)
        link.delay_s = 0.2 * fault.seconds

        def heal() -> None:
            link.delay_s = 0.0

        self._simulator.at(self._simulator.now_s + 3.0, heal)
        return True

    def _reset(self, fault: Fault) -> bool:
        two = self._two(fault)
        found = [s for s in self._cluster.network.sockets.values() if s.is_between(two)]
        if not found:
            return False
        self._chance.choice(found).reset()
        return True

    def _message(self, fault: Fault) -> bool:
        self._messages.append(fault)
        return False

    def pass_on(self, rank: int, peer: int, purpose: str) -> None:
        """Raise ``ChannelError`` where snapshots do not get through."""
        if purpose == "hold" and not self._is_closed:
            per_node = self._cluster.shape.ranks_per_node
            nodes = [self._cluster.machines[r // per_node].number for r in (rank, peer)]
            if any(self._off.get(node, 0.0) > self._simulator.now_s for node in nodes):
                raise ChannelError("nothing gets through")

    def message(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """What is sent in the place of these parts."""
        for fault in self._messages:
            if fault.rank % self._cluster.shape.ranks != rank or self._is_closed:
                continue
            if purpose != "hold" and not (purpose in ("control", "exchange") and fault.kind == "damage"):
                continue
            key = (-1, id(fault))
            self._skip[key] = self._skip.get(key, 0) + 1
            if self._skip[key] < fault.amount:
                continue
            self._messages.remove(fault)
            self._note(fault)
            if fault.kind == "damage":
                return _damaged(parts, self._chance)
            if fault.kind == "double":
                return [*parts, *parts]
            if self._chance.random() < 0.5:
                raise ChannelError("lost on the way")
            return []
        return parts

    # -- training --------------------------------------------------------------------------------------

    def _late_pack(self, fault: Fault) -> bool:
        """Copies take so long that an optimizer step does not wait for them."""
        rank = self._rank(fault.rank)
        if rank is None:
            return False
        rank.slow_pack_s = min(1.5, 0.5 * fault.seconds)

        def heal() -> None:
            rank.slow_pack_s = 0.0

        self._simulator.at(self._simulator.now_s + 3.0, heal)
        return True

    def _for_a_while(self, fault: Fault, begin: Callable[[Rank], None], end: Callable[[Rank], None]) -> bool:
        rank = self._rank(fault.rank)
        if rank is None:
            return False
        begin(rank)
        self._simulator.at(self._simulator.now_s + 0.3 * fault.amount, lambda: end(rank))
        return True

    def _moved(self, fault: Fault) -> bool:
        return self._for_a_while(
            fault, lambda r: setattr(r.state, "is_moved", True), lambda r: setattr(r.state, "is_moved", False)
        )

    def _grown(self, fault: Fault) -> bool:
        return self._for_a_while(
            fault, lambda r: setattr(r.state, "extra_bytes", 1 << 17), lambda r: setattr(r.state, "extra_bytes", 0)
        )

    def _unhealthy(self, fault: Fault) -> bool:
        rank = self._rank(fault.rank)
        if rank is not None:
            rank.unhealthy = True
        return rank is not None


class _Wire:
    """``Cuts`` of one rank."""

    def __init__(self, injector: Injector, rank: Rank) -> None:
        self._injector = injector
        self._rank = rank

    def dialling(self, rank: int, peer: int, purpose: str) -> None:
        """See ``Cuts``."""
        self._injector.pass_on(rank, peer, purpose)

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """See ``Cuts``."""
        self._injector.pass_on(rank, peer, purpose)
        return self._injector.message(rank, peer, purpose, parts)

    def receiving(self, rank: int, peer: int, purpose: str) -> None:
        """See ``Cuts``."""


def _damaged(parts: Sequence[Bytes], chance: random.Random) -> Sequence[Bytes]:
    """The same bytes, one bit aside."""
    candidates = [n for n, part in enumerate(parts) if part.nbytes]
    if not candidates:
        return parts
    chosen = chance.choice(candidates)
    copy = parts[chosen].copy()
    copy[chance.randrange(copy.nbytes)] ^= 1 << chance.randrange(8)
    return [*parts[:chosen], copy, *parts[chosen + 1 :]]
