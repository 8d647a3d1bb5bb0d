# SPDX-License-Identifier: Apache-2.0
"""Mode ``popularity``: every snapshot holds the dense units and the experts whose loss would hurt most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_moetion.arrays import Int64s
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, shared
from megatron_moetion.framework import TokenSource
from megatron_moetion.modes.choices import Choices, combine_counts
from megatron_moetion.modes.mode import Losses, Remark, Site, SnapshotMode, Staged, Vote
from megatron_moetion.modes.recalibration import Recalibration
from megatron_moetion.recover.exchange import Meeting, add
from megatron_moetion.recover.plan import choose_newest_experts
from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.channel import Reducer
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.schedule.scheduler import Carried
from megatron_moetion.schedule.sizes import Sizes
from megatron_moetion.select.book import ExpertBook, ExpertState, Rules, lost_until, mean_recent, recent_until
from megatron_moetion.select.budget import Limits, affordable_experts, experts_per_snapshot, popularity_copies
from megatron_moetion.select.popularity import OPEN_MAX
from megatron_moetion.select.shares import Shares
from megatron_moetion.snapshot.capture import Contents
from megatron_moetion.snapshot.host_state import size_bound
from megatron_moetion.store.retention import Newest, Retention, Settled
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import Inventory, UnitKind

_CHOOSES = "chooses"
"""Key of the facts that every rank in this mode gives."""
_EXPERTS = "experts"
"""Key of how many experts a rank has, where capacity is to be raised."""
_CAPTURES_REMEMBERED = OPEN_MAX + 1
"""Captures of one expert in the host state: those that are not agreed on yet, and the one before."""


class PopularityBlueprint:
    """Dense units and selected experts, whose tokens are counted."""

    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    def facts(self, site: Site) -> dict[str, Any]:
        """That this rank's mode is this one; where capacity is to be raised, of how many experts, or why it cannot."""
        if not site.config.recalibrates:
            return {_CHOOSES: True}
        problem = self._tokens.capacity_problem()
        return {_CHOOSES: True, _EXPERTS: len(self._tokens.token_counters())} | (
            {"capacity": problem} if problem else {}
        )

    def build(self, site: Site, facts: Sequence[Mapping[str, Any]]) -> PopularityMode:
        """See ``Blueprint``. Collective among the ranks that share experts; ``ChannelError`` on a lost one.

        ``ConfigError`` where capacity is to be raised and cannot be, on any rank, or where no rank has experts.
        """
        problem = next((f["capacity"] for f in facts if "capacity" in f), None)
        if site.config.recalibrates and not any(f.get(_EXPERTS) for f in facts):
            problem = "no rank has an MoE layer"
        if problem is not None:
            raise shared(
                ConfigError(f"--moetion-capacity-recalibration on can do nothing here: {problem}; leave it out")
            )
        num_experts = len(self._tokens.token_counters())
        inventory = _with_book(site.inventory, num_experts)
        if not all(_CHOOSES in facts[peer] for peer in site.expert_peers):  # another mode there is refused later
            site = replace(site, expert_peers=(site.identity.owner,))
        nbytes, always = self._bytes_of_all(site, inventory)
        affordable: float = math.inf
        if site.config.snapshot_bytes and nbytes.any():
            affordable = affordable_experts(Shares.of(nbytes, 0, 0), always, site.config.snapshot_bytes)
        limits = experts_per_snapshot(site.config, num_experts, affordable)
        shares = Shares.of(nbytes, limits.usual, limits.most)
        most_bytes = int(shares.most_bytes[site.expert_peers.index(site.identity.owner)])
        copies = popularity_copies(inventory.units, limits.most, most_bytes if shares.ranks > 1 else math.inf)
        spec = ArenaSpec.of(replace(site.identity, layout=inventory.fingerprint), inventory, copies, limits.most)
        recalibration = Recalibration(
            self._tokens,
            site.fabric,
            site.journal,
            site.config.recalibration_iterations,
            is_on=site.config.recalibrates,
        )
        return PopularityMode(
            config=site.config,
            inventory=inventory,
            spec=spec,
            limits=limits,
            shares=shares,
            tokens=self._tokens,
            reducer=site.fabric.reducer("popularity", site.expert_peers, combine_counts),
            recalibration=recalibration,
        )

    def _bytes_of_all(self, site: Site, inventory: Inventory) -> tuple[Int64s, list[int]]:
        """Bytes of each expert on each rank that shares it, int64[experts, ranks]; then of what every snapshot has."""
        peers = site.expert_peers
        mine = [inventory.units[u].nbytes for u in _always(inventory)]
        table = np.zeros((1 + len(self._tokens.token_counters()), len(peers)), dtype=np.int64)
        sizes = {u.name: u.nbytes for u in inventory.units}
        experts = [sizes.get(c.expert, 0) for c in self._tokens.token_counters()]
        table[:, peers.index(site.identity.owner)] = [sum(mine), *experts]
        meeting = Meeting(site.fabric, "bytes of shared experts", peers, add, site.config.timeout_s)
        found = np.array(meeting.combine(table.ravel().tolist()), dtype=np.int64).reshape(table.shape)
        return found[1:], found[0].tolist()


def _with_book(inventory: Inventory, num_experts: int) -> Inventory:
    """The inventory, its host unit with room for ``ExpertBook.state`` too."""
    each = bytes(8 * num_experts)
    book = {"lost": each, "recent": each, "history": 3 * _CAPTURES_REMEMBERED * each}
    return inventory.with_host_bytes(size_bound({"session": book}))


class PopularityMode(SnapshotMode):
    """See the module."""

    name = "popularity"
    loses_tokens = True
    choose = staticmethod(choose_newest_experts)

    def __init__(
        self,
        *,
        config: MoetionConfig,
        inventory: Inventory,
        spec: ArenaSpec,
        limits: Limits,
        shares: Shares,
        tokens: TokenSource,
        reducer: Reducer,
        recalibration: Recalibration,
    ) -> None:
        counters = tokens.token_counters()
        self.shared = [c.expert for c in counters]
        self.inventory = inventory
        self.spec = spec
        self._config = config
        self._limits = limits
        self._tokens = tokens
        self._recalibration = recalibration
        self._positions = [_position(inventory, c.unit, c.tensor, c.position) for c in counters]
        self._units = [inventory.index.get(c.expert) for c in counters]
        """The unit of each expert; None where its optimizer state is another rank's."""
        self._always = _always(inventory)
        self._always_bytes = sum(inventory.units[u].nbytes for u in self._always)
        self._expert_bytes = sum(inventory.units[u].nbytes for u in self._units if u is not None)
        self._shares = shares
        self._reducer = reducer
        self._number: int | None = None
        """Of the last snapshot's round."""
        self._counts = [0] * len(counters)
        """Tokens by expert then."""
        self._sizes = Sizes(limits.fewest, limits.usual)
        self._book = ExpertBook(
            names=[c.expert for c in counters],
            layers=[c.unit for c in counters],
            rules=Rules(
                policy=config.selection,
                reserved=limits.fewest,
                most=limits.most,
                staleness_cap=config.staleness_cap,
                interval=config.interval,
                lost_token_budget=config.lost_token_budget,
                shares=shares,
            ),
        )
        self._choices = Choices(self._book, self._sizes, config.interval)

    def retention(self, spec: ArenaSpec) -> Retention:
        """The newest whole capture of each unit, and all later ones."""
        return Newest()

    def settle(self, agreed: Agreed) -> Settled:
        """See ``SnapshotMode``. What concerns the choice of experts waits until all that share them know it."""
        self._choices.hear(agreed)
        return super().settle(agreed)

    def exchange(self, iteration: int) -> None:
        """See ``Recalibration.on_step_end``."""
        self._recalibration.on_step_end(iteration)

    def contributed(self, number: int, staged: Staged) -> None:
        """Tell the ranks that share experts how many tokens they have processed here."""
        self._number = number
        self._counts = self._counted(staged)
        self._reducer.contribute(number, self._choices.words(self._counts))

    def vote(self, carried: Carried) -> Vote:
        """See ``SnapshotMode``: first fewer experts, then rarer snapshots."""
        mask, smaller = self._sizes.vote(carried.nbytes, self._snapshot_bytes)
        text = f"snapshots are made to fit ({smaller} here): {carried.why}"
        return Vote(mask=mask, remark=Remark(kind="budget", text=text) if smaller is not None else None)

    def contents(self, iteration: int) -> tuple[Contents | Skip, Remark | None]:
        """The dense units and the chosen experts: the same ones on all ranks that share them, each its shards."""
        number = self._number
        assert number is not None, "a snapshot's contents come after its contribution"
        self._choices.choose(number, iteration, self._counts, self._reducer.results())
        if not self._choices.is_known(number):
            return Skip(reason="agreement", details="the counts of the ranks that share experts are late"), None
        chosen = self._choices.chosen(number)
        if chosen is None:
            return Skip(reason="budget"), None
        excess = self._book.past_budget
        units = (unit for e in chosen if (unit := self._units[e]) is not None)
        contents = Contents(units=(*self._always, *units), tokens=self._by_unit(self._counts))
        return contents, Remark(kind=excess.kind, text=excess.text) if excess is not None else None

    def wait(self, timeout_s: float) -> None:
        """See ``SnapshotMode``: the counts of the ranks that share experts."""
        if self._number is not None:
            self._reducer.wait(self._number, timeout_s)

    def host_state(self) -> dict[str, Any]:
        """See ``ExpertBook.state``."""
        return self._book.state()

    def baseline(self, iteration: int, staged: Staged) -> Contents:
        """All units."""
        counts = self._counted(staged)
        self._book.choose_all(iteration, counts)
        return Contents(units=tuple(range(len(self.inventory.units))), tokens=self._by_unit(counts))

    def recovered(
        self,
        iteration: int,
        captured_at: Mapping[str, int],
        state: Mapping[str, Any],
        staged: Staged,
        add_up: Callable[[Sequence[int]], Sequence[int]],
    ) -> Losses:
        """See ``SnapshotMode``. Lost are the tokens that an expert was trained on after the capture it comes from.

        Every rank counts its own tokens, also of experts whose state other ranks hold.
        """
        now = self._counted(staged)
        losses = self._book.losses(state, captured_at, iteration, now)
        totals, lost, before = (add_up(counts) for counts in (now, losses.lost, lost_until(state)))
        recent = mean_recent(add_up([*recent_until(state), 1]))
        self._book.recover(state, losses, totals=totals, lost=lost, lost_before=before, recent=recent)
        counted = zip(self._book.names, losses.lost, strict=True) if self._tokens.counts_tokens() else ()
        return Losses(by_expert={name: n for name, n in counted if n}, layers=self.layers(staged))

    def resume(self, iteration: int, lost: Mapping[str, int]) -> None:
        """See ``Recalibration.begin``."""
        self._recalibration.begin(iteration, lost)

    def scalars(self) -> dict[str, float]:
        """See ``SnapshotMode``."""
        unsaved = self._book.ledger.unsaved
        return {
            "moetion/unsaved-tokens-max": float(max(unsaved, default=0)),
            "moetion/unsaved-tokens": float(sum(unsaved)),
            "moetion/projected-plt": self._book.projected_share,
            "moetion/experts-per-snapshot": float(self._book.num_chosen),
        }

    def experts(self) -> tuple[ExpertState, ...]:
        """See ``ExpertBook.experts``."""
        return self._book.experts()

    def layers(self, staged: Staged) -> dict[str, tuple[int, int]]:
        """See ``ExpertBook.layers``."""
        counted = self._tokens.counts_tokens()
        return self._book.layers(self._counted(staged), self._tokens.routed_tokens(), counted=counted)

    def describe(self) -> str:
        """See ``SnapshotMode``."""
        parts = [f"{self._sizes.experts_text} of {len(self._units)} experts each"]
        if self._limits.most > self._limits.usual:
            parts[0] += f" (up to {self._limits.most}, as arenas have room for, to keep the budget of lost tokens)"
        if self._shares.ranks > 1:
            busiest = self._shares.busiest_bytes(self._limits.usual) / 2**20
            parts.append(f"at most {busiest:.1f} MiB of them on each of {self._shares.ranks} ranks")
        return ", " + ", ".join([*parts, self._config.selection])

    def _snapshot_bytes(self, num_experts: int) -> int:
        """Of a snapshot of this rank, at most: what it holds of experts is spread over all that share them."""
        return self._always_bytes + min(self._shares.busiest_bytes(num_experts), self._expert_bytes)

    def _counted(self, staged: Staged) -> list[int]:
        """Tokens processed by each expert of this rank's layers as of the last freeze.

        Waits for a device. One iteration late they would not do: they travel with captures, and the tokens that a
        fault costs are counted from them.
        """
        regions = {(unit, region) for unit, region, _ in self._positions}
        tables = {key: staged.staged(*key).view(np.int64).tolist() for key in regions}
        return [tables[unit, region][position] for unit, region, position in self._positions]

    def _by_unit(self, counts: Sequence[int]) -> dict[int, int]:
        return {u: tokens for u, tokens in zip(self._units, counts, strict=True) if u is not None}


def _always(inventory: Inventory) -> tuple[int, ...]:
    """The units of every snapshot."""
    return (*inventory.of_kind(UnitKind.DENSE), *inventory.of_kind(UnitKind.HOST))


def _position(inventory: Inventory, unit: str, tensor: str, position: int) -> tuple[int, int, int]:
    """Unit, region and element of a token count."""
    number = inventory.index[unit]
    region = next(i for i, r in enumerate(inventory.units[number].regions) if r.tensor == tensor)
    return number, region, position
