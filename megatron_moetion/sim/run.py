# SPDX-License-Identifier: Apache-2.0
"""One simulated run: a seed, a shape and a list of faults in, a verdict out."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moetion.errors import MoetionError, NothingRecoverable
from megatron_moetion.run.running import Running
from megatron_moetion.run.starter import Resumed
from megatron_moetion.session import Session
from megatron_moetion.sim import truth
from megatron_moetion.sim.checker import ATTEMPT_LIMIT_S, CALM_ITERATIONS, Checker, Model, Violation
from megatron_moetion.sim.cluster import Cluster, Rank, Shape, Watcher
from megatron_moetion.sim.faults import Fault, Injector
from megatron_moetion.sim.memory import Machine
from megatron_moetion.sim.schedule import Simulator, Stuck
from megatron_moetion.sim.trainee import DENSE_BYTES, EXPERT_BYTES

ATTEMPTS_MAX = 200


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run."""

    problem: str | None
    """The broken promise, or the error that no rank should have; None where all was well."""
    trace: int
    """A digest of every event in order: equal for equal seeds."""
    attempts: int
    faults: Counter[str] = field(default_factory=Counter)
    """Fault events that took place, by kind."""
    checks: int = 0
    virtual_s: float = 0.0
    story: tuple[str, ...] = ()
    """The last events, for a person."""


class Referee(Watcher):
    """Tells the checker what happens, and stops the run where it objects."""

    def __init__(self, simulator: Simulator, shape: Shape, folder: str) -> None:
        self.simulator = simulator
        self.shape = shape
        self._folder = folder
        """Of the run's small files: its name is another one in each run, and is left out of the story."""
        frozen = {r: truth.contents(b"frozen", r, "frozen", 64) for r in range(shape.ranks)}
        self.checker = Checker(
            Model(
                ranks=shape.ranks,
                replicas=shape.replicas,
                mode=shape.mode,
                experts=shape.experts,
                dense_bytes=DENSE_BYTES,
                expert_bytes=EXPERT_BYTES,
                frozen=frozen,
            )
        )
        self.story: list[str] = []
        self.ranks: Callable[[], Sequence[Rank]] = list
        """Those of the present attempt."""
        self.is_calm = False
        """No fault comes any more in this run."""
        self.consent_needed = False
        self.begun: set[tuple[int, int]] = set()
        """Attempts and ranks: those whose state is restored."""
        self._rounds: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._homes: dict[int, set[int]] = {}
        """By rank: its holders at the start."""

    def say(self, text: str) -> None:
        """A line of the story."""
        self.story.append(f"{self.simulator.now_s:9.3f} s  {text}")
        self.simulator.note(text)
        del self.story[:-400]

    def launching(self, cluster: Cluster) -> None:
        """See ``Checker.launching``."""
        self._rounds, self._steps = {}, {}
        self.consent_needed = False
        config = cluster.config()
        self.checker.replicas, self.checker.group_nodes = config.replicas, config.coding_nodes or config.replicas + 1
        self.say(f"attempt {cluster.attempt + 1} on {', '.join(m.key for m in cluster.machines)}")
        domains = {machine.key: machine.domain for machine in cluster.machines if machine.domain}
        self.checker.launching(self.simulator.now_s, _images(cluster.machines), domains)

    def started(self, rank: Rank, running: Running, resumed: Resumed | None) -> None:
        """See ``Watcher``."""
        state = rank.state
        self.begun.add((rank.attempt, rank.number))
        self._homes[rank.number] = {holder.rank for holder in running.pipeline.holders()}
        if not rank.number:
            self.say(f"rank 0 starts at {state.iteration}, {'recovered' if resumed else 'new'}")
        is_last = self.checker.started(
            self.simulator.now_s,
            rank.number,
            iteration=running.agreement.stable,
            recovered=resumed is not None,
            epoch=resumed.epoch if resumed is not None else 0,
            mark=state.mark,
            state={name: array.tobytes() for name, array in state.arrays.items()},
            counts=state.counts.tolist(),
            lost_tokens=resumed.lost_tokens if resumed is not None else 0,
        )
        if is_last:
            machines = {r.machine.key: r.machine for r in self.ranks()}
            self.checker.all_have_started(_images(machines.values()))

    def stepped(self, rank: Rank) -> None:
        """See ``Watcher``."""
        self.checker.stepped(rank.number, rank.attempt, rank.state.iteration, rank.state.mark)

    def before_save(self, rank: Rank, session: Session) -> None:
        """See ``Watcher``."""
        self._rounds[rank.number] = self._rounds.get(rank.number, -1) + (
            rank.state.iteration % session.running.interval == 0
        )
        if rank.unhealthy:
            self.checker.vetoes(rank.state.iteration)
        self.checker.before_save(
            self.simulator.now_s,
            rank.number,
            self._rounds[rank.number],
            is_full=self._is_full(session),
            at_home=self._is_at_home(rank, session),
        )

    def saved(self, rank: Rank, session: Session, took_s: float) -> None:
        """See ``Watcher``."""
        run = session.running
        self.checker.saved(
            rank.number,
            self._rounds[rank.number],
            stable=run.agreement.stable,
            on_page=session.stable_iteration,
            heard=run.agreement.heard,
            redundancy=run.agreement.redundancy,
            is_full=self._is_full(session),
            at_home=self._is_at_home(rank, session),
            took_s=took_s,
            num_threads=len(rank.process.tasks),
        )
        here = [f"rank{r.number:05d}.arena" in r.machine.files for r in self.ranks() if r.machine is rank.machine]
        if all(here):
            self.checker.deleted.discard(rank.machine.key)
        steps = self._steps[rank.number] = self._steps.get(rank.number, 0) + self.is_calm
        if steps >= CALM_ITERATIONS:
            self.checker.calm(
                rank.number,
                rank.state.iteration,
                run.agreement.stable,
                run.agreement.redundancy,
                is_found=f"rank{rank.number:05d}.arena" in rank.machine.files,
            )

    def _is_full(self, session: Session) -> bool:
        holders = session.running.pipeline.holders()
        return sum(h.is_active for h in holders) >= session.running.coding.holders

    def _is_at_home(self, rank: Rank, session: Session) -> bool:
        return {h.rank for h in session.running.pipeline.holders()} == self._homes[rank.number]

    def on_disk(self, iteration: int) -> None:
        """See ``Watcher``."""
        self.say(f"disk has iteration {iteration}")
        self.checker.saved_on_disk(iteration)

    def failed(self, rank: Rank, error: MoetionError) -> None:
        """See ``Watcher``."""
        text = str(error).replace(self._folder, "")
        self.say(f"rank {rank.number} ends: {type(error).__name__}: {text[:300]}")
        if isinstance(error, NothingRecoverable):
            self.checker.gave_up(str(error))
            self.consent_needed = True


def _images(machines: Iterable[Machine]) -> list[tuple[str, bytes]]:
    """Every arena in these memories, and its place."""
    return [(f"{m.key}/{name}", file.array.tobytes()) for m in machines for name, file in sorted(m.files.items())]


def run(seed: int, shape: Shape, faults: Sequence[Fault]) -> Outcome:
    """Train through all these faults, then on without any; one process, no other effects."""
    with tempfile.TemporaryDirectory(prefix="moetion-sim-") as folder:
        simulator = Simulator(seed)
        referee = Referee(simulator, shape, folder)
        cluster = Cluster(simulator, shape, Path(folder), seed, referee)
        referee.ranks = lambda: cluster.ranks
        injector = Injector(cluster, referee, faults)
        problem = None
        try:
            _train(cluster, referee, injector)
        except (Violation, Stuck, MoetionError, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            trace = simulator.trace
            injector.close()
            cluster.close()
    return Outcome(
        problem=problem,
        trace=trace,
        attempts=cluster.attempt + 1,
        faults=injector.counts,
        checks=referee.checker.checks,
        virtual_s=simulator.now_s,
        story=tuple(referee.story),
    )


def _train(cluster: Cluster, referee: Referee, injector: Injector) -> None:
    simulator = cluster.simulator
    for _ in range(ATTEMPTS_MAX):
        cluster.rest()
        injector.before_launch()
        referee.launching(cluster)
        limit_s = ATTEMPT_LIMIT_S
        attempt = cluster.attempt + 1

        def judge(attempt: int = attempt, limit_s: float = limit_s) -> None:
            if cluster.attempt == attempt and not all(r.process.is_dead for r in cluster.ranks):
                simulator.problem = Violation(f"an attempt lasts {limit_s:.0f} s and longer: {simulator.describe()}")

        simulator.at(simulator.now_s + limit_s, judge)
        codes = cluster.launch()
        referee.say(f"attempt {cluster.attempt} ended with {codes}")
        if not any(codes):
            return
        if referee.consent_needed:
            cluster.settings["allow_fresh"] = True
            referee.checker.consented = True
        else:
            cluster.settings.pop("allow_fresh", None)
    raise Violation(f"{ATTEMPTS_MAX} attempts, and no end")
