# SPDX-License-Identifier: Apache-2.0
"""An iteration whose forward and backward passes run twice counts once: tokens, routers, and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

ITERATIONS = 5
TWICE = 3
WAYS = (
    pytest.param(
        "rerun state machine", marks=pytest.mark.proves("Steps run again by the rerun state machine", "counts")
    ),
    "paged stash, a stand-in",
    pytest.param("paged stash", marks=pytest.mark.proves("Steps run again by paged stash", "counts")),
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank noted, by how its third iteration ran."""
    folder: Path = tmp_path_factory.mktemp("reruns")
    with Nursery("reruns") as nursery:
        notes = nursery.notes(150, folder, store=str(folder / "store"))
    return [{n["name"]: n for n in of_rank} for of_rank in notes]


def test_counts_of_a_run_whose_iterations_run_once(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for of_rank in ranks:
        once = of_rank["once"]
        assert once["passes"] == ITERATIONS
        totals = [sum(map(sum, layers)) for layers in once["totals"]]
        assert 0 < totals[0] < totals[1] < totals[-1]
        assert once["timelines"] == list(range(1, ITERATIONS + 1))


@pytest.mark.parametrize("way", WAYS)
def test_what_runs_twice_counts_once(ranks: list[dict[str, dict[str, Any]]], way: str) -> None:
    if way not in ranks[0]:
        pytest.skip("this Megatron has no paged stash")
    for of_rank in ranks:
        once, found = of_rank["once"], of_rank[way]
        assert found["passes"] == ITERATIONS + 1
        assert [step.get("lm loss") for step in found["losses"]] == [step.get("lm loss") for step in once["losses"]]
        assert found["totals"] == once["totals"]
        assert found["routers"] == once["routers"]
        assert found["timelines"] == [1, 2, 2, 4, 5], "no window is derived from the iteration that ran twice"


@pytest.mark.proves("p2p_communicator of attach, given to the schedule before there is a model", "traffic")
def test_a_communicator_that_the_schedule_was_given_before_is_watched_while_the_run_lasts(
    ranks: list[dict[str, dict[str, Any]]],
) -> None:
    for of_rank in ranks:
        found = of_rank["given"]
        assert found["losses"] == found["plain"]
        assert all("pipeline" in lanes for lanes in found["lanes"])
        assert found["after"] == 0
        assert found["more"] == 0, "the schedule needs nothing else"
