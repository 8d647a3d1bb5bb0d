# SPDX-License-Identifier: Apache-2.0
"""What is said of the layers' tokens after a recovery, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fabrics import loopback_fabrics
from session_job import Job
from support import ToyState, together

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.modes.recalibration import Recalibration, over_ranks
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.channel import Fabric


class Layers(ToyState):
    """A state whose routers tell."""

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        return {"layers.0.dense": {"routed": 10.0, "processed": 7.0, "debt": 2.0}}


def make(folder: Path, tokens: ToyState, fabric: Fabric | None = None, is_on: bool = True) -> Recalibration:
    """Of a job of one rank, unless told."""
    fabric = fabric if fabric is not None else loopback_fabrics(1)[0]
    journal = Journal(fabric.rank, 0, folder / "events.jsonl" if fabric.rank == 0 else None, SystemClock())
    return Recalibration(tokens, fabric, journal, iterations=50, is_on=is_on)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in found if e["event"] == "layer_tokens"]


def looks(folder: Path) -> list[tuple[int, str]]:
    return [(e["iteration"], e["when"]) for e in events(folder)]


def until(is_done: Callable[[], bool]) -> None:
    """Wait for it, at most a minute."""
    for _ in range(6000):
        if is_done():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize(("every", "after", "repaid"), [(1, 110, 160), (7, 112, 161), (1000, 1000, 2000)])
def test_it_looks_three_times_however_rarely_it_is_called(tmp_path: Path, every: int, after: int, repaid: int) -> None:
    adapter = Layers()
    recalibration = make(tmp_path, adapter)
    recalibration.begin(100, {"layers.0.experts.1": 5})
    assert adapter.recalibrated == {"layers.0.experts.1": 5}
    for iteration in range(101, 4000):
        if iteration % every == 0:
            recalibration.on_step_end(iteration)
    assert looks(tmp_path) == [(100, "before"), (after, "after"), (repaid, "repaid")]


class Dropless(ToyState):
    """A state whose experts have no capacity."""

    def capacity_problem(self) -> str | None:
        return "the model is dropless"


def test_a_model_that_makes_it_do_nothing_is_refused_at_the_start_and_only_where_it_is_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "popularity", "state": Dropless, "staleness_cap": 4}
    with pytest.raises(ConfigError, match="capacity-recalibration on can do nothing here: the model is dropless"):
        Job(tmp_path / "on", **settings, capacity_recalibration="on")
    job = Job(tmp_path / "off", **settings, capacity_recalibration="off")
    job.start()
    job.train(6)
    job.crash()
    second = Job(tmp_path / "off", 1, **settings, capacity_recalibration="off")
    (resumed, _) = second.start()
    assert resumed is not None
    assert resumed.lost_tokens > 0
    assert [state.recalibrated for state in second.states] == [{}, {}]
    second.crash()


class Stage(SimpleNamespace):
    """A rank's site that has nothing but settings."""

    config = MoetionConfig(capacity_recalibration="on")

    @property
    def inventory(self) -> Any:
        raise LookupError("it goes on")


@pytest.mark.parametrize(
    ("experts", "error"),
    [((0, 0), ConfigError("on can do nothing here: no rank has an MoE layer")), ((0, 3), LookupError("it goes on"))],
)
def test_it_is_refused_where_no_rank_has_experts(experts: tuple[int, int], error: Exception) -> None:
    """A pipeline stage may have dense layers alone."""
    site: Any = Stage()
    blueprints = [PopularityBlueprint(ToyState(num_experts=n)) for n in experts]
    facts = [blueprint.facts(site) for blueprint in blueprints]
    for blueprint in blueprints:
        with pytest.raises(type(error), match=str(error)):
            blueprint.build(site, facts)


def test_where_it_is_off_it_looks_and_raises_nothing(tmp_path: Path) -> None:
    tokens = Layers()
    make(tmp_path, tokens, is_on=False).begin(100, {"layers.0.experts.1": 5})
    assert tokens.recalibrated == {}
    assert looks(tmp_path) == [(100, "before")]


def test_routers_that_do_not_tell_are_not_spoken_of(tmp_path: Path) -> None:
    make(tmp_path, ToyState()).begin(7, {"layers.0.experts.1": 5})
    assert looks(tmp_path) == []


def test_layers_are_added_up_over_the_ranks_that_run_them() -> None:
    first, second = ({"routed": r, "processed": p, "debt": 4.0} for r, p in ((10.0, 7.0), (5.0, 5.0)))
    other = {"routed": 1.0, "processed": 1.0, "debt": 0.0}
    assert over_ranks([{"layers.0.dense": first}, {"layers.1.dense": other}, {}, {"layers.0.dense": second}]) == {
        "layers.0.dense": {"routed": 15.0, "processed": 12.0, "dropped": 3.0, "debt": 4.0},
        "layers.1.dense": {"routed": 1.0, "processed": 1.0, "dropped": 0.0, "debt": 0.0},
    }


def test_a_look_waits_for_nobody_and_is_said_when_the_last_rank_has_been_heard(tmp_path: Path) -> None:
    with loopback_fabrics(2) as fabrics:
        first, second = (make(tmp_path, Layers(), fabric) for fabric in fabrics)
        together(lambda: first.begin(100, {}), lambda: second.begin(100, {}))
        for iteration in (110, 120):
            first.on_step_end(iteration)
        assert looks(tmp_path) == [(100, "before")]
        second.on_step_end(111)
        until(lambda: bool(first.on_step_end(130) or looks(tmp_path)[1:]))
        assert looks(tmp_path) == [(100, "before"), (110, "after")]
        (event,) = [e for e in events(tmp_path) if e.get("when") == "after"]
        layer = {"routed": 20.0, "processed": 14.0, "debt": 2.0, "dropped": 6.0}
        assert event["layers"] == {"layers.0.dense": layer}, "both ranks'"


def test_ranks_with_other_layers_are_heard_too(tmp_path: Path) -> None:
    class OtherLayers(ToyState):
        def layer_tokens(self) -> dict[str, dict[str, float]]:
            return {"layers.1.dense": {"routed": 4.5, "processed": 4.5, "debt": 0.0}}

    with loopback_fabrics(3) as fabrics:
        states = (OtherLayers(), Layers(), ToyState())
        ranks = [make(tmp_path, tokens, fabric) for tokens, fabric in zip(states, fabrics, strict=True)]
        together(*(lambda rank=rank: rank.begin(100, {}) for rank in ranks))  # type: ignore[misc]
        for rank in ranks[::-1]:
            rank.on_step_end(110)
        until(lambda: bool(ranks[0].on_step_end(111) or looks(tmp_path)[1:]))
        before, after = (e["layers"] for e in events(tmp_path))
        assert (
            before
            == after
            == {
                "layers.0.dense": {"routed": 10.0, "processed": 7.0, "debt": 2.0, "dropped": 3.0},
                "layers.1.dense": {"routed": 4.5, "processed": 4.5, "debt": 0.0, "dropped": 0.0},
            }
        )
