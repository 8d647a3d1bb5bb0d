# SPDX-License-Identifier: Apache-2.0
"""A sentence that recommends a mode, or names what is missing and what would help. Pure; ``choice`` decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_moetion.config import MIN_PERIOD
from megatron_moetion.plan.choice import choose, gib
from megatron_moetion.plan.costs import (
    GRADIENT_DTYPES,
    Cost,
    RankState,
    Resources,
    Shortage,
    cost_of_exact,
    cost_of_full,
    costs_of,
    costs_of_exact,
    shortage,
    smallest_period,
)
from megatron_moetion.select.budget import Limits


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Which mode to take. ``mode`` is empty where none fits, or where too little is known to choose."""

    mode: str = ""
    period: int = 0
    """Iterations; 0 except in mode ``exact``."""
    experts: int = 0
    """K, experts in a snapshot; 0 except in mode ``popularity``."""
    shortage: Shortage = field(default_factory=Shortage)
    """What is missing for the requested period, or for the best one if none was requested."""
    sentence: str
    """For a person."""


def recommend(
    state: RankState, resources: Resources, limits: Limits, period: int = 0, *, lost_token_budget: float = 0.0
) -> Advice:
    """What ``choose`` takes, or what is missing and what would help.

    ``period``: the only period of mode ``exact`` to consider, and no other mode; 0: all. ``limits``: experts in a
    snapshot of mode ``popularity``; ``lost_token_budget`` bounds what its faults cost.
    """
    if resources.link_bytes is None:
        return _by_memory(state, resources, period)
    costs = costs_of(state, limits, period)
    asked = [c for c in costs if c.mode == "exact"] if period else costs
    choice = choose(asked, resources, lost_token_budget=lost_token_budget)
    use = _use(choice.cost, resources)
    if choice.fits and choice.mode == "full":
        return Advice(mode="full", sentence=f"Mode 'full' fits, and replays no steps: {use}.")
    if choice.fits and choice.mode == "exact":
        sentence = f"Mode 'exact' with --moetion-period {choice.period} fits: {use}."
        return Advice(mode="exact", period=choice.period, sentence=sentence)
    if choice.fits:
        lack, _, more = _nothing_fits(state, resources)
        others = _or([*_smaller_states(state, resources), *more])
        most = f"up to {lost_token_budget:.2%} of experts' tokens" if lost_token_budget else "tokens of experts"
        sentence = (
            f"Mode 'popularity' with {choice.experts} of {state.num_experts} experts a snapshot fits, and its faults "
            f"cost {most}: {use}. Of the modes that lose nothing, {lack}; what helps: {others}."
        )
        return Advice(mode="popularity", experts=choice.experts, sentence=sentence)
    if period:
        missing = choice.shortage
        lack = f"Mode 'exact' with --moetion-period {period} does not fit: {_lack(choice.cost, missing)}"
        other = choose(costs_of(state, limits), resources, lost_token_budget=lost_token_budget)
        helps = [_named(other.cost, state)] if other.fits else []
        more = [_more(choice.cost, missing, resources)]
    else:
        lack, missing, more = _nothing_fits(state, resources)
        lack = lack[0].upper() + lack[1:]
        helps = []
        if choice.mode == "popularity":
            more = [*more, f"{_more(choice.cost, choice.shortage, resources)} in {_named(choice.cost, state)}"]
    helps += [*_smaller_states(state, resources), *more]
    return Advice(shortage=missing, sentence=f"{lack}; what helps: {_or(helps)}.")


def _named(cost: Cost, state: RankState) -> str:
    if cost.mode == "exact":
        return f"--moetion-period {cost.period}"
    some = f" ({cost.experts} of {state.num_experts} experts a snapshot; faults cost tokens)" if cost.experts else ""
    return f"mode {cost.mode!r}{some}"


def _nothing_fits(state: RankState, resources: Resources) -> tuple[str, Shortage, list[str]]:
    """Neither ``full`` nor any period fits: why, what is missing, and how much more memory or bandwidth is enough."""
    full, costs = cost_of_full(state), list(costs_of_exact(state))
    carried = [c for c in (full, *costs) if not shortage(c, resources).link_bytes]
    held = [c for c in (full, *costs) if not shortage(c, resources).node_bytes]
    for_link = min(carried, key=lambda c: c.node_bytes, default=None)
    for_memory = min(held, key=lambda c: c.sent_bytes, default=None)
    more = [f"{_more(c, shortage(c, resources), resources)} ({_name(c)})" for c in (for_memory, for_link) if c]
    if for_link:
        missing = shortage(for_link, resources)
        why = f"the memory: {_name(for_link)}, the least that fits the link, {_lack(for_link, missing)}"
    elif for_memory:
        missing = shortage(for_memory, resources)
        least = "the least" if resources.node_bytes is None else "the least that fits the memory"
        why = f"the link: {_name(for_memory)}, {least}, {_lack(for_memory, missing)}"
    else:
        link = replace(shortage(costs[-1], resources), node_bytes=0)
        smallest = min(full, costs[0], key=lambda c: c.node_bytes)
        memory = replace(shortage(smallest, resources), link_bytes=0)
        missing = replace(link, node_bytes=memory.node_bytes)
        more = [f"more than {_more(costs[-1], missing, resources)}"]
        why = (
            f"the link or the memory: even {_name(costs[-1])} {_lack(costs[-1], link)}, and even {_name(smallest)} "
            f"{_lack(smallest, memory)}"
        )
    return f"nothing fits {why}", missing, more


def _by_memory(state: RankState, resources: Resources, period: int) -> Advice:
    """Advice without knowledge of the link."""
    ask = "--iteration-s and --gb-per-s (or, with a model, --mfu and --machine)"
    if resources.node_bytes is None:
        return Advice(sentence=f"To learn which mode and period fit, give {ask}, and --node-memory-gib.")
    full = cost_of_full(state)
    fitting = [c.period for c in costs_of_exact(state) if not shortage(c, resources)]
    enough = [] if shortage(full, resources) else ["mode 'full'"]
    if fitting:
        enough.append(f"mode 'exact' with periods up to {fitting[-1]}")
    if period in fitting:
        enough = [f"mode 'exact' with --moetion-period {period}"]
    if enough and (not period or period in fitting):
        suffices = " and for ".join(enough)
        return Advice(sentence=f"Memory suffices for {suffices}; to learn what the link carries, give {ask}.")
    least = min(full, cost_of_exact(state, MIN_PERIOD), key=lambda c: c.node_bytes)
    found = cost_of_exact(state, period) if period else least
    missing = shortage(found, resources)
    helps = _or([*enough, *_smaller_states(state, resources), _more(found, missing, resources)])
    lack = f"{_name(found).capitalize()} {_lack(found, missing)}"
    return Advice(shortage=missing, sentence=f"{lack}; what helps: {helps}.")


def _name(cost: Cost) -> str:
    return f"with period {cost.period}" if cost.period else f"in mode '{cost.mode}'"


def _use(cost: Cost, resources: Resources) -> str:
    link = "" if resources.link_bytes is None else f" of {gib(resources.link_bytes)}"
    memory = "" if resources.node_bytes is None else f" of {gib(resources.node_bytes)}"
    return (
        f"a rank sends {gib(cost.sent_bytes)}{link} GiB an iteration, and a node's arenas take "
        f"{gib(cost.node_bytes)}{memory} GiB"
    )


def _lack(cost: Cost, missing: Shortage) -> str:
    found = []
    if missing.link_bytes:
        carried = f"{gib(missing.link_bytes)} more than the link carries"
        found.append(f"a rank sends {gib(cost.sent_bytes)} GiB an iteration, {carried}")
    if missing.node_bytes:
        found.append(f"a node's arenas take {gib(cost.node_bytes)} GiB, {gib(missing.node_bytes)} more than there are")
    return ", and ".join(found)


def _smaller_states(state: RankState, resources: Resources) -> list[str]:
    """Changes to the run with which a period of mode ``exact`` fits; two together if neither alone is enough."""
    fewest = min(GRADIENT_DTYPES)
    half = [("bf16 gradients", replace(state, gradient_bytes=fewest))] if state.gradient_bytes > fewest else []
    fewer = [
        (
            f"{r} replica{'s' if r > 1 else ''}",
            replace(state, replicas=r, coding_nodes=state.coding_nodes if r > 1 else 0),
        )
        for r in reversed(range(1, state.replicas))
    ]
    both = [(f"{h} and {f}", replace(s, gradient_bytes=fewest)) for h, _ in half for f, s in fewer]
    alone = [*_first_that_fits(half, resources), *_first_that_fits(fewer, resources)]
    return alone or _first_that_fits(both, resources)


def _first_that_fits(changes: Sequence[tuple[str, RankState]], resources: Resources) -> list[str]:
    """The first change with which a period fits, with that period; empty if there is none."""
    for name, changed in changes:
        if fits := smallest_period(changed, resources):
            return [name if resources.link_bytes is None else f"{name} (with period {fits.period})"]
    return []


def _more(cost: Cost, missing: Shortage, resources: Resources) -> str:
    """What a link and a node would need for a mode to fit."""
    found = []
    if missing.link_bytes:
        times = cost.sent_bytes / max(resources.link_bytes or 0, 1)
        found.append(f"{times:.2f} times the bandwidth or iteration time")
    if missing.node_bytes:
        found.append(f"{gib(missing.node_bytes)} GiB more memory a node")
    return " and ".join(found)


def _or(texts: Sequence[str]) -> str:
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
