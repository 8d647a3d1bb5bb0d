# SPDX-License-Identifier: Apache-2.0
"""What is said of the layers' tokens after a recovery, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from session_job import Job
from support import ToyState

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ChannelError
from megatron_moetion.modes.recalibration import Recalibration, over_ranks
from megatron_moetion.observe.journal import Journal


class Alone:
    """The part of a fabric that is used, of a job of one rank."""

    rank = 0

    def gather(self, document: Any) -> list[Any]:
        return [document]


class Layers(ToyState):
    """A state whose routers tell."""

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        return {"layers.0.dense": {"routed": 10.0, "processed": 7.0, "debt": 2.0}}


def make(folder: Path, tokens: ToyState, is_on: bool = True) -> Recalibration:
    journal = Journal(0, 0, folder / "events.jsonl", SystemClock())
    return Recalibration(tokens, cast(Any, Alone()), journal, iterations=50, is_on=is_on)


def looks(folder: Path) -> list[tuple[int, str]]:
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(e["iteration"], e["when"]) for e in events if e["event"] == "layer_tokens"]


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


@pytest.mark.parametrize("switch", ["on", "off"])
def test_a_model_that_makes_it_do_nothing_is_said_at_the_start_and_only_where_it_is_on(
    tmp_path: Path, switch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megatron_moetion")
    job = Job(tmp_path, mode="popularity", state=Dropless, staleness_cap=4, capacity_recalibration=switch)
    job.start()
    text = "--moetion-capacity-recalibration on does nothing here: the model is dropless"
    assert sum(text in r.message for r in caplog.records) == (switch == "on")
    job.train(6)
    job.crash()
    second = Job(tmp_path, 1, mode="popularity", state=Dropless, staleness_cap=4, capacity_recalibration=switch)
    (resumed, _) = second.start()
    assert resumed is not None
    assert resumed.lost_tokens > 0
    assert [state.recalibrated for state in second.states] == [{}, {}]
    second.crash()


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


def test_a_fabric_that_fails_in_a_look_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rank hears next, on a fabric that has lost step, would be taken for something else."""
    first = Job(tmp_path, mode="popularity")
    first.start()
    first.train(2)
    first.crash()
    job = Job(tmp_path, 1, mode="popularity", capacity_recalibration="on", recalibration_iterations=5)
    job.start()  # looks again one iteration after the recovery
    job.network.timeout_s = 0.5
    broken = job.fabrics[1]
    said: list[str] = []

    def fail(document: Any) -> list[Any]:
        raise ChannelError("only here")

    monkeypatch.setattr(broken, "gather", fail)
    monkeypatch.setattr(broken, "start_agreement", lambda *masks: said.append("agreement"))
    monkeypatch.setattr(broken, "start_sum", lambda counts: said.append("sum"))
    job.train(4)
    assert said == []
    job.crash()
