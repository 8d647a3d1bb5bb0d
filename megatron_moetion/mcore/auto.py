# SPDX-License-Identifier: Apache-2.0
"""Mode ``auto``: a run whose mode is still to be chosen, after a few iterations that show what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, UnsupportedState, shared
from megatron_moetion.plan.costs import Copies, Cost, costs_of_inventory
from megatron_moetion.recover.disk import Disk, load_from_disk
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.replicate.witness import Past
from megatron_moetion.run.network import look_at_network
from megatron_moetion.run.prepare import Claimed
from megatron_moetion.run.trial import MEASURED, WARM_UP, Offers, Trial, offers_of_all
from megatron_moetion.select.budget import experts_per_snapshot

if TYPE_CHECKING:
    from megatron_moetion.mcore.attach import InMode, Loop


class Choosing:
    """A run between ``attach`` and the choice of its mode. Nothing is captured meanwhile.

    Nothing is lost that a run without checkpoints would not lose: a fault before the choice begins anew, or from the
    checkpoint on disk. A run that may have had a state to lose chooses as it starts, by memory alone.
    """

    def __init__(
        self, loop: Loop, claimed: Claimed, placement: Placement, offers: Offers, trial: Trial, *, is_first: bool
    ) -> None:
        """Takes over ``claimed``. ``is_first``: whether there is nothing to lose yet. See ``choosing``."""
        self.is_first = is_first
        self._loop = loop
        self._claimed = claimed
        self._placement = placement
        self._offers = offers
        self._trial = trial
        self._iteration: int | None = None
        self._is_open = True
        self._hooks = ExitStack()

    @property
    def has_begun(self) -> bool:
        """Whether the loop may train."""
        return self._iteration is not None

    def begin(self, load_persistent: Callable[[], int | None] | None) -> dict[str, Any]:
        """Load from disk, if there is something, and begin to measure. Returns pipeline arguments. Collective."""
        run = self._claimed
        loaded = load_from_disk(run.fabric, Disk(load=load_persistent), None, -1, run.journal)
        self._iteration = loaded or 0
        if run.fabric.rank == 0:
            run.journal.info(
                self._iteration,
                f"mode auto: snapshots begin after {WARM_UP + MEASURED} iterations, which show what an iteration "
                "leaves for them; a fault before costs what has been trained since this start",
            )
        if not run.config.replicas:
            return {}
        return self._loop.watch(self._trial.scheduler, self._placement.node_of, self._hooks)

    def step_end(self, iteration: int, *, healthy: bool, stepped: bool) -> bool:
        """See ``Trial.step_end``. ``ConfigError`` before ``begin`` and after the end."""
        if not self._is_open:
            raise ConfigError("the session was closed; on_step_end() cannot follow close()")
        if not self.has_begun:
            raise ConfigError("call start() before on_step_end()")
        self._iteration = iteration
        return self._trial.step_end(iteration, healthy=healthy, stepped=stepped)

    def settle(self, undo: ExitStack) -> InMode:
        """Choose, and attach in that mode; see ``Loop.attach``. Collective."""
        self._hooks.close()
        run, fabric = self._claimed, self._claimed.fabric
        seen = look_at_network(fabric, self._placement, run.host, run.config.timeout_s)
        ours = run.node.num_ranks / max(run.local_ranks, run.node.num_ranks)  # nodes of one machine share its memory
        choice = self._trial.choose(
            network=seen,
            node_bytes=int(run.node.room_bytes() * ours),
            device_bytes=self._loop.free_device_bytes(),
        )
        if fabric.rank == 0:
            iteration = -1 if self._iteration is None else self._iteration
            left_out = "".join(f"; {mode} is left out: {why}" for mode, why in self._offers.refused.items())
            run.journal.info(iteration, f"mode auto: {choice.line}{left_out}")
            run.journal.event("chosen", iteration=iteration, **asdict(choice), refused=dict(self._offers.refused))
        return self._loop.attach(run.config.in_mode(choice.mode, choice.period), run, undo, seen)

    def close(self) -> None:
        """End a run that has not chosen."""
        if self._is_open and self._iteration is not None and self._claimed.fabric.rank == 0:
            text = "the run ended before mode auto had chosen: there is no snapshot"
            self._claimed.journal.warn(self._iteration, text)
        self._is_open = False
        with self._hooks:
            self._claimed.close()

    def abandon(self) -> None:
        """The same without waiting for other ranks, in a process that is about to end."""
        self._is_open = False
        with self._hooks:
            self._claimed.abandon()


def choosing(loop: Loop, claimed: Claimed) -> Choosing:
    """Ask all ranks what each mode would take. Collective. ``UnsupportedState`` where no mode can capture the state."""
    config, fabric, node = claimed.config, claimed.fabric, claimed.node
    try:
        keys, domains = zip(*fabric.gather([node.key, "" if node.position else claimed.domain]), strict=True)
        placement = place(keys, config.replicas, domains, config.coding_nodes)
    except ConfigError as error:
        raise shared(error) from None
    copies = Copies(coding=config.coding, ranks_per_node=node.num_ranks)
    offers = offers_of_all(fabric, costs(loop, config, copies))
    past = claimed.witness.past() if fabric.rank == 0 else Past()
    attempt, past = fabric.reduce([claimed.attempt, asdict(past)], lambda low, high: [max(low[0], high[0]), low[1]])
    seen = replace(config, schedule="steady") if config.schedule == "eager" else config  # it leaves training its share
    trial = Trial(
        fabric,
        offers,
        loop.scheduler(seen, claimed.host),
        claimed.host.clock,
        share=config.coding.share,
        lost_token_budget=config.lost_token_budget,
        sees_traffic=not loop.graphs,
    )
    is_first = not past["had_baseline"] and (past["is_known"] or attempt == 0)
    return Choosing(loop, claimed, placement, offers, trial, is_first=is_first)


def costs(loop: Loop, config: MoetionConfig, copies: Copies) -> dict[str, Sequence[Cost] | str]:
    """What each mode would take on this rank, or why its state cannot be captured in it. Talks to no other rank."""
    found: dict[str, Sequence[Cost] | str] = {}
    for mode in config.allowed_modes:
        chosen = config.in_mode(mode)
        if loop.graphs and mode == "popularity":
            found[mode] = (
                "tokens have to be counted before CUDA graphs are captured, so it is never chosen later: "
                "--moetion-mode popularity begins with it"
            )
            continue
        try:
            with ExitStack() as undo:
                state, _ = loop.state(chosen)
                undo.callback(state.close)
                experts = len(state.tokens.token_counters()) if state.tokens is not None else 0
                limits = experts_per_snapshot(chosen, experts) if mode == "popularity" else None
                found[mode] = costs_of_inventory(mode, state.inventory(), copies, limits=limits, period=config.period)
        except (UnsupportedState, ConfigError) as error:
            found[mode] = str(error)
    return found
