# SPDX-License-Identifier: Apache-2.0
"""Mode ``auto``: ranks learn what each mode would take and what there is, and agree on the strongest that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import and_
from typing import Any

from megatron_moetion.clock import Clock
from megatron_moetion.errors import UnsupportedState, shared
from megatron_moetion.plan.choice import STRONGEST_FIRST, Choice, choose
from megatron_moetion.plan.costs import SHARE, Cost, HostMemory, Resources
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.run.network import Network
from megatron_moetion.schedule.scheduler import Scheduler

WARM_UP = 2
"""Iterations that are no examples: compilers and allocators are at work."""
MEASURED = 4
"""Iterations that are."""


@dataclass(frozen=True, kw_only=True)
class Offers:
    """What modes would take, as the busiest rank has it, and why others are left out. Equal on all ranks."""

    costs: tuple[Cost, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Reasons, by mode."""


def offers_of_all(fabric: Fabric, mine: Mapping[str, Sequence[Cost] | str]) -> Offers:
    """From this rank's costs by mode, or the reason why its state cannot be captured in it. Collective.

    A mode that any rank refuses is left out. ``UnsupportedState`` where none is left.
    """
    costs = {f"{c.mode}/{c.period}/{n}": asdict(c) for n, c in _numbered(mine)}
    refused = {mode: reason for mode, reason in mine.items() if isinstance(reason, str)}
    everyone = fabric.reduce({"costs": costs, "refused": refused}, _both)
    refused = everyone["refused"]
    found = [_cost(raw) for _, raw in sorted(everyone["costs"].items()) if raw["mode"] not in refused]
    if not found:
        reasons = "; ".join(f"{mode}: {refused[mode]}" for mode in STRONGEST_FIRST if mode in refused)
        raise shared(UnsupportedState(f"no mode can capture this run's state: {reasons}"))
    return Offers(costs=tuple(found), refused=refused)


def agreed_mode(fabric: Fabric, found: str) -> str:
    """The mode of this run's arenas, from what each rank found on its node; empty without any. Collective.

    Where nodes hold arenas of several modes, the survey refuses those of the others.
    """
    return str(fabric.reduce(found, lambda lower, higher: lower or higher))


class Trial:
    """The first iterations of a run whose mode is to be chosen. Its methods that say so are collective."""

    def __init__(
        self,
        fabric: Fabric,
        offers: Offers,
        scheduler: Scheduler,
        clock: Clock,
        *,
        share: float,
        lost_token_budget: float,
        sees_traffic: bool = True,
    ) -> None:
        """``scheduler`` hears of training's traffic, and moves nothing; ``sees_traffic``: whether of all of it.

        ``share``: how often a snapshot crosses the network.
        """
        self._fabric = fabric
        self._offers = offers
        self.scheduler = scheduler
        self._clock = clock
        self._share = share
        self._budget = lost_token_budget
        self._sees_traffic = sees_traffic
        self._steps = 0
        self._began_s = 0.0

    def step_end(self, iteration: int, *, healthy: bool, stepped: bool) -> bool:
        """An iteration is over; whether it is time to choose. Collective once enough of them are measured.

        ``healthy``: whether this rank's loop calls the state good enough to go back to; ``stepped``: whether the
        optimizer took its step, as on all ranks.
        """
        self._steps += stepped
        self.scheduler.cut(iteration, is_typical=stepped and self._steps > WARM_UP)
        if self._steps < WARM_UP:
            return False
        if self._steps == WARM_UP:
            self._began_s = self._clock.monotonic()
        if not stepped or self._steps < WARM_UP + MEASURED:
            return False
        return bool(self._fabric.reduce(healthy, and_))

    @property
    def iteration_s(self) -> float | None:
        """Mean duration of the measured iterations; None before there are any."""
        count = self._steps - WARM_UP
        return (self._clock.monotonic() - self._began_s) / count if count > 0 else None

    def choose(self, *, network: Network | None, node_bytes: int, device_bytes: int | None) -> Choice:
        """The strongest mode that fits on every rank. Collective; right after ``step_end``, or before any iteration.

        ``network``: None where no replica leaves this rank; ``node_bytes``: room for arenas on its node;
        ``device_bytes``: free memory of its GPU, None without one. The line ends with what was measured.
        """
        mine = {
            "link": self._link(network) if network is not None else None,
            "node": node_bytes,
            "device": device_bytes,
        }
        found = self._fabric.reduce(mine, _tightest)
        link = found["link"]
        resources = Resources(
            link_bytes=link["nbytes"] if link is not None else None,
            node_bytes=found["node"],
            device_bytes=found["device"],
        )
        choice = choose(self._offers.costs, resources, lost_token_budget=self._budget)
        if link is None:
            return choice
        return replace(choice, line=f"{choice.line}. Measured on rank {link['rank']}, the tightest: {link['why']}")

    def _link(self, network: Network) -> dict[str, Any] | None:
        """What this rank's link carries for snapshots in an iteration, in bytes, and why; None where nobody knows."""
        bytes_per_s, seconds = network.bytes_per_s or network.least, self.iteration_s
        if not bytes_per_s or seconds is None:
            return None
        nbytes = SHARE * bytes_per_s * seconds
        why = (
            f"an iteration takes {seconds:.2f} s at {bytes_per_s / 1e6:.0f} MB/s; what training sends was not seen, "
            f"so {SHARE:.0%} of that counts"
        )
        if self._sees_traffic:
            self.scheduler.learn(bytes_per_s)
            carried = self.scheduler.carries(self._share)
            if math.isfinite(carried.nbytes):
                nbytes, why = carried.nbytes * self._share, carried.why
        return {"nbytes": int(nbytes), "why": why, "rank": self._fabric.rank}


def _numbered(mine: Mapping[str, Sequence[Cost] | str]) -> list[tuple[int, Cost]]:
    return [pair for costs in mine.values() if not isinstance(costs, str) for pair in enumerate(costs)]


def _cost(raw: Mapping[str, Any]) -> Cost:
    memory = {name: HostMemory(**raw[name]) for name in ("arena", "rank")}
    return Cost(**{**raw, **memory})


def _both(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    costs = dict(lower["costs"])
    for key, raw in higher["costs"].items():
        costs[key] = _larger(costs[key], raw) if key in costs else raw
    return {"costs": costs, "refused": {**higher["refused"], **lower["refused"]}}


def _larger(one: Any, other: Any) -> Any:
    """Of two costs of one form, each figure of the rank that has more of it."""
    if isinstance(one, dict):
        return {name: _larger(one[name], other[name]) for name in one}
    return one if isinstance(one, str) else max(one, other)


def _tightest(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    links = [link for link in (lower["link"], higher["link"]) if link is not None]
    devices = [nbytes for nbytes in (lower["device"], higher["device"]) if nbytes is not None]
    return {
        "link": min(links, key=lambda link: int(link["nbytes"]), default=None),
        "node": min(lower["node"], higher["node"]),
        "device": min(devices, default=None),
    }
