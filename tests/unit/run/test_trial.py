# SPDX-License-Identifier: Apache-2.0
"""Mode auto: offers of all ranks, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fabrics import loopback_fabrics
from support import ManualClock, ManualCondition, spanning, together

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.plan.choice import Choice
from megatron_moetion.plan.costs import SHARE, Cost, HostMemory
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.run.network import Network
from megatron_moetion.run.trial import MEASURED, WARM_UP, Offers, Trial, agreed_mode, offers_of_all
from megatron_moetion.schedule.planner import HEADROOM
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import DEADLINE_SHARE, Scheduler, no_drawing
from megatron_moetion.schedule.timeline import Lane

NOTHING = HostMemory(state_bytes=0, log_bytes=0, pending_bytes=0)
NODE = 1 << 40


def cost(mode: str, sent: int, *, node: int = 1 << 30, device: int = 0, period: int = 0) -> Cost:
    return Cost(
        mode=mode,
        period=period,
        experts=4 if mode == "popularity" else 0,
        snapshot_bytes=sent,
        sent_bytes=sent,
        arena=NOTHING,
        rank=NOTHING,
        node_bytes=node,
        device_bytes=device,
        replayed_steps=period,
    )


COSTS: Mapping[str, Sequence[Cost]] = {
    "full": [cost("full", 1200)],
    "exact": [cost("exact", 1000, period=2), cost("exact", 600, period=8)],
    "popularity": [cost("popularity", 300)],
}


def all_offers(*mine: Mapping[str, Sequence[Cost] | str]) -> list[Offers]:
    with loopback_fabrics(len(mine)) as fabrics:
        return together(*(lambda r=r, m=m: offers_of_all(fabrics[r], m) for r, m in enumerate(mine)))  # type: ignore[misc]


def test_each_figure_is_of_the_rank_that_has_most_of_it() -> None:
    light = {"full": [cost("full", 10, node=7)]}
    heavy = {"full": [cost("full", 4, node=9)], "popularity": [cost("popularity", 3)]}
    first, second = all_offers(light, heavy)
    assert first == second
    assert [(c.mode, c.sent_bytes, c.node_bytes) for c in first.costs] == [("full", 10, 9), ("popularity", 3, 1 << 30)]


def test_a_mode_that_one_rank_refuses_is_left_out_everywhere() -> None:
    offers = all_offers(COSTS, {**COSTS, "exact": "a graph holds the step"})
    for each in offers:
        assert {c.mode for c in each.costs} == {"full", "popularity"}
        assert each.refused == {"exact": "a graph holds the step"}


def test_where_every_mode_is_refused_all_ranks_say_why() -> None:
    with pytest.raises(UnsupportedState, match="full: no optimizer knows it; exact: no gradients"):
        all_offers({"full": "no optimizer knows it"}, {"exact": "no gradients", "full": "no optimizer knows it"})


def test_the_mode_of_arenas_that_any_node_has_is_known_to_all() -> None:
    with loopback_fabrics(3) as fabrics:
        found = ["", "exact", ""]
        calls = (lambda r=r: agreed_mode(fabrics[r], found[r]) for r in range(3))
        assert together(*calls) == ["exact"] * 3  # type: ignore[misc]


def network(bytes_per_s: float | None, least: float = 0.0) -> Network:
    return Network(bytes_per_s=bytes_per_s, least=least, rank=0, mean=least, unknown=0, interfaces=("lo",))


def trial_of(
    fabric: SocketFabric,
    clock: ManualClock,
    schedule: str = "steady",
    costs: Mapping[str, Sequence[Cost]] = COSTS,
    **options: Any,
) -> Trial:
    scheduler = Scheduler(
        schedule,
        HostStopwatch(clock),
        clock=clock,
        condition=ManualCondition(clock),
        eager_slice_bytes=1 << 20,
        draw=no_drawing,
    )
    offers = offers_of_all(fabric, costs)
    return Trial(fabric, offers, scheduler, clock, lost_token_budget=0.0375, **{"share": 1.0, **options})


def iterate(trial: Trial, clock: ManualClock, number: int, iteration_s: float, busy_s: float = 0.0) -> bool:
    """An iteration in which training sends for ``busy_s`` in its middle; the first ones are slow."""
    slow = 100 if number <= WARM_UP else 1
    clock.sleep(slow * (iteration_s - busy_s) / 2)
    if busy_s:
        with spanning(trial.scheduler.recorder, Lane.GRADIENT, 1 << 20):
            clock.sleep(slow * busy_s)
    clock.sleep(slow * (iteration_s - busy_s) / 2)
    return trial.step_end(number, healthy=True, stepped=True)


def chosen(
    networks: Sequence[Network | None],
    *,
    iteration_s: float = 2.0,
    busy_s: Sequence[float] = (0.0, 0.0),
    room: Sequence[int] = (NODE, NODE),
    schedule: str = "steady",
    **options: Any,
) -> list[Choice]:
    """The choice of two ranks after measured iterations."""
    with loopback_fabrics(2) as fabrics:

        def rank(number: int) -> Choice:
            clock = ManualClock()
            trial = trial_of(fabrics[number], clock, schedule, **options)
            for step in range(1, WARM_UP + MEASURED + 1):
                is_time = iterate(trial, clock, step, iteration_s, busy_s[number])
                assert is_time == (step == WARM_UP + MEASURED)
            assert trial.iteration_s == pytest.approx(iteration_s)
            return trial.choose(network=networks[number], node_bytes=room[number], device_bytes=None)

        return together(*(lambda r=r: rank(r) for r in range(2)))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bytes_an_iteration", "mode", "period"),
    [(1201, "full", 0), (1199, "exact", 2), (999, "exact", 8), (599, "popularity", 0), (1, "popularity", 0)],
)
@pytest.mark.parametrize("sees_traffic", [True, False])
def test_the_strongest_mode_that_the_thinnest_link_carries_is_taken(
    bytes_an_iteration: int, mode: str, period: int, sees_traffic: bool
) -> None:
    """Of time that training leaves, as much as sizes of snapshots later reckon with; half of all where it is unseen."""
    share = HEADROOM * DEADLINE_SHARE if sees_traffic else SHARE
    rate = bytes_an_iteration / share / 2.0
    first, second = chosen([network(rate), network(1e9)], sees_traffic=sees_traffic)
    assert first == second
    assert (first.mode, first.period) == (mode, period)
    assert first.fits == (bytes_an_iteration > 1)
    assert "Measured on rank 0, the tightest: " in first.line
    assert ("for them at" in first.line) == sees_traffic


@pytest.mark.parametrize(("busy_s", "mode"), [(0.0, "full"), (1.0, "exact"), (1.9, "popularity"), (2.0, "popularity")])
def test_windows_of_the_measured_iterations_count_and_slow_first_ones_do_not(busy_s: float, mode: str) -> None:
    """All that differs is how long training uses the network of one rank."""
    million = {name: [replace(c, sent_bytes=c.sent_bytes * 10**6) for c in found] for name, found in COSTS.items()}
    rate = 1e9
    with loopback_fabrics(2) as fabrics:

        def rank(number: int) -> Choice:
            clock = ManualClock()
            trial = trial_of(fabrics[number], clock, "bubble", million)
            for step in range(1, WARM_UP + MEASURED + 1):
                iterate(trial, clock, step, 2.0, busy_s if number else 0.0)
            return trial.choose(network=network(rate), node_bytes=NODE, device_bytes=None)

        choices = together(*(lambda r=r: rank(r) for r in range(2)))  # type: ignore[misc]
    assert {c.mode for c in choices} == {mode}
    found = r"rank (\d), the tightest: the network has (.*) of 2.00 s for them at 1000 MB/s"
    measured = re.search(found, choices[0].line)
    assert measured is not None
    assert float(measured.group(2)) == pytest.approx(2.0 - busy_s, abs=0.03)  # whole slices
    assert measured.group(1) == "1" or not busy_s


def test_copies_for_several_holders_share_a_link() -> None:
    """A mode's bytes are those of all copies."""
    rate = 1201 / (HEADROOM * DEADLINE_SHARE) / 2.0
    for replicas in (1, 3):
        assert chosen([network(rate), network(1e9)], share=replicas)[0].mode == "full"


def test_a_link_that_nobody_uses_is_no_limit() -> None:
    assert {(c.mode, "Measured" in c.line) for c in chosen([None, None])} == {("full", False)}


@pytest.mark.parametrize(("least", "mode"), [(1.0, "popularity"), (0.0, "full")])
def test_a_rank_whose_probe_failed_takes_what_the_others_saw_at_least(least: float, mode: str) -> None:
    """Where no probe came back the network is not known, and no limit."""
    assert {c.mode for c in chosen([network(None, least), network(None, least)])} == {mode}


def test_memory_of_the_tightest_node_is_what_there_is() -> None:
    short = (1 << 30) - 1
    first, second = chosen([None, None], room=(NODE, short))
    assert first == second
    assert not first.fits
    assert "memory" in first.line


def test_a_rank_whose_state_is_not_healthy_puts_the_choice_off_for_all() -> None:
    with loopback_fabrics(2) as fabrics:

        def rank(number: int) -> list[bool]:
            trial = trial_of(fabrics[number], ManualClock())
            ends = [(True, True)] * (WARM_UP + MEASURED - 1) + [(number == 0, True), (True, False), (True, True)]
            return [trial.step_end(i, healthy=h, stepped=s) for i, (h, s) in enumerate(ends, 1)]

        expected = [False] * (WARM_UP + MEASURED + 1) + [True]
        assert together(*(lambda r=r: rank(r) for r in range(2))) == [expected, expected]  # type: ignore[misc]


def test_before_anything_is_measured_memory_alone_counts() -> None:
    with loopback_fabrics(1) as fabrics:
        trial = trial_of(fabrics[0], ManualClock())
        assert trial.choose(network=network(1.0), node_bytes=NODE, device_bytes=None).mode == "full"
