# SPDX-License-Identifier: Apache-2.0
"""What is said of the layers' tokens after a recovery, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from session_job import Job
from support import ToyState

from megatron_moetion.errors import ChannelError
from megatron_moetion.observe.journal import Journal
from megatron_moetion.recover.recalibration import Recalibration, over_ranks


class Alone:
    """The part of a fabric that is used, of a job of one rank."""

    rank = 0

    def gather(self, document: Any) -> list[Any]:
        return [document]


class Layers(ToyState):
    """A state whose routers tell."""

    def __init__(self, why_fixed: str | None = None) -> None:
        super().__init__()
        self.why_fixed = why_fixed

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        return {"layers.0.dense": {"routed": 10.0, "processed": 7.0, "debt": 2.0}}

    def recalibrate(self, lost: Any) -> str | None:
        super().recalibrate(lost)
        return self.why_fixed


def make(folder: Path, tokens: ToyState) -> Recalibration:
    journal = Journal(0, 0, folder / "events.jsonl")
    return Recalibration(tokens, cast(Any, Alone()), journal, iterations=50)


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


def test_it_says_why_capacity_stays_only_if_tokens_were_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for lost, said in (({}, 0), ({"layers.0.experts.1": 5}, 1)):
        caplog.clear()
        make(tmp_path, Layers("the model is dropless")).begin(7, lost)
        assert sum("capacity is not recalibrated: the model is dropless" in r.message for r in caplog.records) == said


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
    job = Job(tmp_path, mode="popularity")
    job.network.timeout_s = 0.5
    job.start()
    for session in job.sessions:
        session._recalibration._due = [(2, "after")]
    job.train(1)
    broken = job.sessions[1]._fabric
    said: list[str] = []

    def fail(document: Any) -> list[Any]:
        raise ChannelError("only here")

    monkeypatch.setattr(broken, "gather", fail)
    monkeypatch.setattr(broken, "start_agreement", lambda *masks: said.append("agreement"))
    monkeypatch.setattr(broken, "start_sum", lambda counts: said.append("sum"))
    job.train(4)
    assert said == []
    job.crash()
