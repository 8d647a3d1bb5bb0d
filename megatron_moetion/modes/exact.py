# SPDX-License-Identifier: Apache-2.0
"""Mode ``exact``: every snapshot holds a slice of the state and all gradients, and a recovery is bitwise.

A recovery loads captures of several ages and repeats the optimizer's steps on the logged gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_moetion.config import DEFAULT_PERIOD, MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.framework import StepNote, StepReplayer
from megatron_moetion.modes.mode import Remark, Site, SnapshotMode, Staged, Vote
from megatron_moetion.recover.plan import choose_chains
from megatron_moetion.recover.rollforward import roll_forward
from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.schedule.scheduler import Carried
from megatron_moetion.select.budget import exact_copies, longer_period, shortest_period
from megatron_moetion.select.rotation import Rotation, remembered_steps
from megatron_moetion.snapshot.capture import Captured, Contents
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.chains import chain_layout
from megatron_moetion.store.manifest import Record
from megatron_moetion.store.retention import Chains, Retention, Settled
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import UnitKind

_PERIODS = range(DEFAULT_PERIOD, MIN_PERIOD - 1, -1)
"""From the usual one down."""
_EVERY_SIZE = (1 << 63) - 1
"""The vote of a rank whose snapshots cannot be smaller or rarer."""


@dataclass(frozen=True)
class ExactBlueprint:
    """Slices and gradients. The period is set, or that of existing arenas, or follows from bytes or memory."""

    replayer: StepReplayer

    def facts(self, site: Site) -> dict[str, Any]:
        """This rank's facts about the period, where it has to be chosen."""
        config = site.config
        if config.period:
            return {}
        if config.snapshot_bytes:
            return {"shortest": shortest_period(self.cut(site, MAX_PERIOD), config.snapshot_bytes)}
        return {
            "found": site.node.mode_found()[1],
            "arenas": site.local_ranks * (1 + config.coding.share),
            "needs": [self.spec(site, self.cut(site, p)).nbytes for p in _PERIODS],
            "room": site.node.room_bytes(),
        }

    def build(self, site: Site, facts: Sequence[Mapping[str, Any]]) -> ExactMode:
        """See ``Blueprint``."""
        period, note = self._period(site, facts)
        self.replayer.remember(remembered_steps(period))
        log = self.cut(site, period)
        return ExactMode(site.config, log, self.spec(site, log), self.replayer, note)

    def cut(self, site: Site, period: int) -> GradientLog:
        """State as it is captured with this period; the host state has room for the steps that may be replayed."""
        steps = remembered_steps(period) * self.replayer.bytes_a_step
        return gradient_log(site.inventory.with_host_bytes(steps), period)

    def spec(self, site: Site, log: GradientLog) -> ArenaSpec:
        """The arena of a state cut like this."""
        identity = replace(site.identity, period=len(log.groups), layout=log.inventory.fingerprint)
        return ArenaSpec.of(identity, log.inventory, exact_copies(log))

    def _period(self, site: Site, facts: Sequence[Mapping[str, Any]]) -> tuple[int, str | None]:
        """The period that suits all ranks, and why it is not the usual one."""
        if site.config.period:
            return site.config.period, None
        if site.config.snapshot_bytes:
            shortest = max(int(f["shortest"]) for f in facts if "shortest" in f)
            if shortest > MAX_PERIOD:
                log = self.cut(site, MAX_PERIOD)
                raise ConfigError(
                    f"--moetion-snapshot-bytes {site.config.snapshot_bytes} is too little for mode 'exact' on some "
                    f"rank: here the gradients of an iteration are {log.log_bytes} bytes, and {log.state_bytes} "
                    f"bytes of state must be captured within {MAX_PERIOD} iterations"
                )
            return shortest, None
        return period_that_fits([f for f in facts if "needs" in f])


def period_that_fits(facts: Sequence[Mapping[str, Any]]) -> tuple[int, str | None]:
    """The longest period up to the usual one whose arenas fit on every node, and why it is shorter. Pure.

    ``facts`` by rank: ``found``, the period of arenas of this run that are there (0: none); ``arenas``, how many the
    rank's node holds; ``needs``, bytes of this rank's arena by period, from the usual one down; ``room``, bytes.
    """
    found = Counter(f["found"] for f in facts if f["found"])
    if found:  # a run that goes on: its arenas take room already, and are of use with their own period only
        return int(found.most_common(1)[0][0]), None
    # A small rank's node may have to hold a large rank's replica, so the largest has to fit everywhere.
    needs = [max(sizes) for sizes in zip(*(f["needs"] for f in facts), strict=True)]
    tightest = min(facts, key=lambda f: f["room"] / f["arenas"])
    fits = (p for p, need in zip(_PERIODS, needs, strict=True) if need * tightest["arenas"] <= tightest["room"])
    period = next(fits, MIN_PERIOD)
    if period == DEFAULT_PERIOD:
        return period, None
    return period, (
        f"the period is {period}, not {DEFAULT_PERIOD}: of the store's free memory on the tightest node "
        f"{tightest['room'] / 2**30:.2f} GiB may be used, and period {DEFAULT_PERIOD} takes "
        f"{needs[0] * tightest['arenas'] / 2**30:.2f} GiB; enlarge shared memory, or choose with --moetion-period"
    )


class ExactMode(SnapshotMode):
    """See the module."""

    name = "exact"
    waits_for_replication = True
    choose = staticmethod(choose_chains)

    def __init__(
        self, config: MoetionConfig, log: GradientLog, spec: ArenaSpec, replayer: StepReplayer, note: str | None
    ) -> None:
        self.inventory = log.inventory
        self.spec = spec
        self.note = note
        self._config = config
        self._log = log
        self._replayer = replayer
        self._step = StepNote()
        self._rotation = Rotation(log, -1, dict.fromkeys(log.log_of, -1))
        units = log.inventory.units
        self._largest_bytes = sum(units[u].nbytes for u in log.always) + log.log_bytes + max(log.group_bytes)

    def retention(self, spec: ArenaSpec) -> Retention:
        """The chains that lead to the stable iteration, and all that may lead to later ones."""
        return Chains(chain_layout(spec.units))

    def packed(self, captured: Captured) -> None:
        """See ``Rotation.packed``."""
        is_complete, is_late = captured.left_out is None, captured.left_out == "late"
        self._rotation.packed(is_there=captured.is_there, captured=is_complete, late=is_late, zero=captured.zero)

    def settle(self, agreed: Agreed) -> Settled:
        """See ``SnapshotMode``."""
        if agreed.is_news:
            self._rotation.settle(agreed.stable, agreed.recoverable)
        return self._rotation.settled

    def note_step(self, iteration: int, before: int, *, stepped: bool = True) -> str | None:
        """Enter the optimizer's step into the log. Where it cannot be replayed, all state is captured anew."""
        self._step = self._replayer.note_step(iteration, stepped=stepped)
        if iteration <= before:
            return f"after iteration {before} came {iteration}"
        if self._step.problem is None and iteration != before + 1:
            problem = f"after iteration {before} came {iteration}: the steps between are not in the log"
            self._step = StepNote(problem=problem)
        if self._step.problem is not None:
            self._rotation.interrupt(iteration)
        return None

    def recoverable(self, rounds: Mapping[int, bool]) -> Iterable[int]:
        """See ``Rotation.reachable``."""
        return self._rotation.reachable(rounds)

    def given_up(self) -> Iterable[int]:
        """See ``Rotation.unreachable``."""
        return self._rotation.unreachable

    def vote(self, carried: Carried) -> Vote:
        """Snapshots cannot be smaller or rarer; says which period would make them fit."""
        if self._largest_bytes <= carried.nbytes or not carried.is_settled:
            return Vote(mask=_EVERY_SIZE)
        advice = longer_period(self._log, carried.nbytes, 1 + self._config.coding.share)
        text = f"snapshots of {self._largest_bytes / 1e6:.1f} MB do not fit ({carried.why}): {advice}"
        return Vote(mask=_EVERY_SIZE, remark=Remark(kind="budget", text=text))

    def contents(self, iteration: int) -> tuple[Contents | Skip, Remark | None]:
        """A group of slices in turn, all gradients, and the units of every snapshot."""
        turn = self._rotation.turn(iteration)
        self._rotation.begin(iteration, turn)
        problem = self._step.problem
        remark = Remark(kind="missed", text=f"all state is captured anew: {problem}") if problem is not None else None
        if turn.is_gap:
            return Skip(reason="gap"), remark
        contents = Contents(staged=self._log.always, optional=turn.captures, problem=self._step.check)
        if self._step.skipped:
            return replace(contents, zero=turn.logs), remark
        return replace(contents, logs=turn.logs), remark

    def baseline(self, iteration: int, staged: Staged) -> Contents:
        """All units except gradients."""
        self._rotation = Rotation(self._log, iteration, dict.fromkeys(self._log.log_of, iteration))
        logs = self.inventory.of_kind(UnitKind.LOG)
        return Contents(units=tuple(u for u in range(len(self.inventory.units)) if u not in logs))

    def write_back(
        self, packer: Packer, arena: Arena, records: Sequence[Record], adapter_state: Mapping[str, Any], to: int
    ) -> int:
        """See ``roll_forward``."""
        self._replayer.begin_replay(adapter_state)
        log_of = self._log.log_of
        replayed = roll_forward(packer, arena, records, log_of=log_of, to=to, replayer=self._replayer)
        bases = {r.unit: r.iteration for r in records if r.unit in log_of}
        slice_of = {log: unit for unit, log in log_of.items()}
        logged = Counter(slice_of[r.unit] for r in records if r.unit in slice_of and not r.is_zero)
        self._rotation = Rotation(self._log, to, bases, logged)
        return replayed

    def scalars(self) -> dict[str, float]:
        """Bytes of captures that were left out because the slice had no gradient since the last one."""
        return {"moetion/spared-bytes": float(self._rotation.spared_bytes)}

    def describe(self) -> str:
        """See ``SnapshotMode``."""
        return (
            f", 1/{len(self._log.groups)} of the state ({max(self._log.group_bytes) / 2**20:.1f} MiB) and all "
            f"gradients ({self._log.log_bytes / 2**20:.1f} MiB) each"
        )
