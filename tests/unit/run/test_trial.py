# SPDX-License-Identifier: Apache-2.0
"""Mode auto: offers of all ranks, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from fabrics import loopback_fabrics
from support import ManualClock, together

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.plan.choice import Choice
from megatron_moetion.plan.costs import SHARE, Cost, HostMemory
from megatron_moetion.run.trial import MEASURED, STORE_SHARE, WARM_UP, Offers, Trial, agreed_mode, offers_of_all

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


def chosen(iteration_s: float, rates: Sequence[float | None], *, room: Sequence[int] = (NODE, NODE)) -> list[Choice]:
    """The choice of two ranks after iterations of that duration."""
    with loopback_fabrics(2) as fabrics:

        def rank(number: int) -> Choice:
            clock = ManualClock()
            offers = offers_of_all(fabrics[number], COSTS)
            trial = Trial(fabrics[number], offers, clock, lost_token_budget=0.0375)
            for step in range(1, WARM_UP + MEASURED + 1):
                clock.sleep(100 if step <= WARM_UP else iteration_s)
                assert trial.step_end(healthy=True, stepped=True) == (step == WARM_UP + MEASURED)
            assert trial.iteration_s == pytest.approx(iteration_s)
            return trial.choose(link_bytes_a_s=rates[number], node_bytes=room[number], device_bytes=None)

        return together(*(lambda r=r: rank(r) for r in range(2)))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bytes_an_iteration", "mode", "period"),
    [(1200, "full", 0), (1199, "exact", 2), (999, "exact", 8), (599, "popularity", 0), (1, "popularity", 0)],
)
def test_the_strongest_mode_that_the_thinnest_link_carries_is_taken(
    bytes_an_iteration: int, mode: str, period: int
) -> None:
    iteration_s = 2.0
    rate = bytes_an_iteration / SHARE / iteration_s
    for choice in chosen(iteration_s, [rate, 1e9]):
        assert (choice.mode, choice.period) == (mode, period)
        assert choice.fits == (bytes_an_iteration > 1)


def test_a_link_that_nobody_uses_is_no_limit() -> None:
    assert {c.mode for c in chosen(1.0, [None, None])} == {"full"}


def test_memory_of_the_tightest_node_is_what_there_is() -> None:
    short = int((1 << 30) / STORE_SHARE) - 8
    first, second = chosen(1.0, [None, None], room=(NODE, short))
    assert first == second
    assert not first.fits
    assert "memory" in first.line


def test_a_rank_whose_state_is_not_healthy_puts_the_choice_off_for_all() -> None:
    with loopback_fabrics(2) as fabrics:

        def rank(number: int) -> list[bool]:
            trial = Trial(fabrics[number], Offers(costs=(cost("full", 1),)), ManualClock(), lost_token_budget=0.0)
            answers = [trial.step_end(healthy=True, stepped=True) for _ in range(WARM_UP + MEASURED - 1)]
            answers.append(trial.step_end(healthy=number == 0, stepped=True))
            answers.append(trial.step_end(healthy=True, stepped=False))
            answers.append(trial.step_end(healthy=True, stepped=True))
            return answers

        expected = [False] * (WARM_UP + MEASURED + 1) + [True]
        assert together(*(lambda r=r: rank(r) for r in range(2))) == [expected, expected]  # type: ignore[misc]


def test_before_anything_is_measured_memory_alone_counts() -> None:
    def rank(fabric: Any) -> Choice:
        trial = Trial(fabric, offers_of_all(fabric, COSTS), ManualClock(), lost_token_budget=0.0)
        return trial.choose(link_bytes_a_s=1.0, node_bytes=NODE, device_bytes=None)

    with loopback_fabrics(1) as fabrics:
        assert rank(fabrics[0]).mode == "full"
