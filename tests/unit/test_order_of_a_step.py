# SPDX-License-Identifier: Apache-2.0
"""The order of events at the end of a step is a contract: ``Session.on_step_end`` and ``docs/architecture.md`` name it.

A real run of one rank, of which every part writes down what it is asked to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabrics import loopback_fabrics
from support import ToyState, blueprint, scheduler

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import UnsupportedState
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.running import Running
from megatron_moetion.run.starter import Starter
from megatron_moetion.session import Session
from megatron_moetion.snapshot.capture import Contents

STEP = [
    "scheduler.cut",  # before anything of this step is measured, and after all of the last one was
    "adapter.after_step",  # before state is captured: averages and counters move here for the last time
    "protection.watch",  # also where no snapshot is due, or ever will be
    "pipeline.finish",  # before anything uses what the packing thread uses
    "upkeep.check",  # while no thread packs, and before an arena is used again
    "mode.packed",  # before the mode says what this rank can recover
    "agreement.poll",  # before the next round starts, and before anything depends on the stable iteration
    "mode.settle",  # before the vote, the contents and the release that follow from it
    "mode.exchange",  # before the freeze: what it learns may be part of the host state
    "mode.note_step",  # before the freeze: the step is part of the host state
    "adapter.host_state",
    "mode.host_state",
    "packer.freeze",  # before counts and gradients are read, and before training goes on
    "mode.given_up",
    "mode.recoverable",  # after ``packed``
    "scheduler.carries",  # after ``cut``: over the windows that this step's packing will have
    "mode.vote",
    "agreement.start",  # as early as possible: it hides behind the next iteration
    "mode.contributed",  # what ``recoverable`` returned has been said; counts are as of the freeze
    "summary.state_hash",
    "probe before-select",  # an injected fault strikes when ranks have begun to agree and nothing is chosen yet
    "mode.contents",  # after ``settle``, ``counts`` and ``freeze``
    "adapter.moved",  # last, right before addresses are read
    "releases.take",  # after ``settle``: what arenas may release, less what is being copied to disk
    "pipeline.submit",  # after the freeze; releases that first
    "summary.drops",
    "pipeline.remarks",  # what the snapshots before have brought about
]


class Written:
    """Stands before an object and writes down the named calls of it."""

    def __init__(self, name: str, behind: Any, log: list[str], replaced: dict[str, Callable[..., Any]]) -> None:
        self._name, self._behind, self._log, self._replaced = name, behind, log, replaced

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._behind, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            event = f"{self._name}.{name}"
            self._log.append(event)
            return self._replaced.get(event, found)(*arguments, **named)

        return call


WATCHED = (
    "scheduler",
    "adapter",
    "protection",
    "pipeline",
    "upkeep",
    "mode",
    "agreement",
    "packer",
    "summary",
    "releases",
)
SILENT = {"releases.learn", "packer.staged", "pipeline.rounds", "pipeline.redundancy"}
"""Asked by parts, at any time."""


@contextmanager
def run(folder: Path, mode: str = "popularity", **settings: Any) -> Iterator[tuple[Running, ToyState]]:
    """One rank that has begun."""
    state = ToyState()
    prepared = prepare(
        config=MoetionConfig(mode=mode, run_id="r", store=str(folder), replicas=0, pack_threads=1, **settings),
        adapter=state,
        blueprint=blueprint(mode, state),
        fabric=loopback_fabrics(1)[0],
        topology="toy",
        scheduler=scheduler(),
        host=Host(environment={}),
    )
    running, _ = Starter(prepared).start()
    try:
        yield running, state
    finally:
        prepared.undo.close()


def events(
    running: Running,
    iteration: int = 1,
    waits: bool = False,
    stepped: bool = True,
    **replaced: Callable[..., Any],
) -> list[tuple[str, ...]]:
    """What one ``on_step_end`` does, in order; ``replaced`` calls by event, ``__`` for the dot."""
    log: list[str] = []
    instead = {name.replace("__", "."): call for name, call in replaced.items()}
    parts: dict[str, Any] = {name: Written(name, getattr(running, name), log, instead) for name in WATCHED}
    if waits:
        parts["mode"].waits_for_replication = True  # type: ignore[attr-defined]
    parts["probe"] = lambda point, _: log.append(f"probe {point}")
    Session(replace(running, **parts)).on_step_end(iteration, stepped=stepped)
    return [e for e in log if e not in SILENT]  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_a_step_has_one_order(tmp_path: Path, mode: str) -> None:
    with run(tmp_path, mode) as (running, _):
        assert events(running) == [e for e in STEP if e != "mode.settle"], "nothing was agreed on before"
        for iteration in (2, 3, 4):
            assert events(running, iteration) == STEP


def test_a_mode_that_waits_does_so_when_the_last_snapshot_is_packed_and_before_anything_is_agreed_on(
    tmp_path: Path,
) -> None:
    with run(tmp_path) as (running, _):
        found = events(running, waits=True)
        after = found.index("mode.packed")
        assert found[after : after + 4] == [
            "mode.packed", "scheduler.urgent", "pipeline.catch_up", "agreement.poll",
        ]  # fmt: skip


def test_where_no_snapshot_is_due_only_the_distance_is_watched(tmp_path: Path) -> None:
    with run(tmp_path, interval=3) as (running, _):
        assert events(running, 1) == STEP[:3]
        assert events(running, 3) == [e for e in STEP if e != "mode.settle"]


def test_without_an_optimizer_step_no_average_moves_and_the_mode_is_told(tmp_path: Path) -> None:
    told: list[bool] = []
    with run(tmp_path) as (running, _):

        def note_step(iteration: int, before: int, *, stepped: bool) -> None:
            told.append(stepped)

        found = events(running, 1, stepped=False, mode__note_step=note_step)
        assert found == [e for e in STEP if e not in ("adapter.after_step", "mode.settle")]
        assert events(running, 2, mode__note_step=note_step) == STEP
    assert told == [False, True]


def test_without_results_a_step_is_the_same_and_waits_for_none(tmp_path: Path) -> None:
    with run(tmp_path) as (running, _):
        for iteration in (1, 2, 3):
            assert events(running, iteration, agreement__poll=list) == [e for e in STEP if e != "mode.settle"]


def test_several_results_that_come_at_once_are_settled_one_after_the_other(tmp_path: Path) -> None:
    with run(tmp_path, "full") as (running, _):
        for iteration in (1, 2, 3):
            events(running, iteration, agreement__poll=list)
        assert events(running, 4).count("mode.settle") == 3


def test_an_unhealthy_iteration_and_the_one_before_it_are_vetoed_and_not_captured(tmp_path: Path) -> None:
    with run(tmp_path, "full") as (running, _):
        for iteration in range(1, 6):
            Session(running).on_step_end(iteration, healthy=iteration != 4)
            running.pipeline.drain()
        assert running.pipeline.counts.dropped["unhealthy"] == 1
        assert running.agreement.stable == 2
        for iteration in (6, 7, 8):
            Session(running).on_step_end(iteration)
            running.pipeline.drain()
        assert running.agreement.stable == 6


def test_a_step_without_a_snapshot_still_agrees(tmp_path: Path) -> None:
    def no_state(*_: Any) -> None:
        raise UnsupportedState("a set")

    submitted: list[tuple[int, Contents | Skip]] = []
    with run(tmp_path) as (running, _):

        def submit(iteration: int, contents: Contents | Skip, release: Any = None) -> None:
            submitted.append((iteration, contents))
            running.pipeline.submit(iteration, contents, release)

        events(running, 1, pipeline__submit=submit)
        without_moved = [e for e in STEP if e != "adapter.moved"]
        assert events(running, 2, pipeline__submit=submit, packer__freeze=no_state) == without_moved
        assert (
            events(running, 3, pipeline__submit=submit, mode__note_step=lambda *_, **__: "two steps") == without_moved
        )
        assert events(running, 4, pipeline__submit=submit, adapter__moved=lambda: "a tensor") == STEP
        skip = (Skip(reason="gap"), None)
        assert events(running, 5, pipeline__submit=submit, mode__contents=lambda *_: skip) == without_moved
    assert isinstance(submitted[0][1], Contents)
    assert [(i, c.reason) for i, c in submitted[1:] if isinstance(c, Skip)] == [
        (2, "freeze"), (3, "missed"), (4, "moved"), (5, "gap"),
    ]  # fmt: skip


def test_who_waits_for_all_snapshots_waits_for_no_window(tmp_path: Path) -> None:
    """Windows come with iterations, and none goes on."""
    with run(tmp_path) as (running, _):
        log: list[str] = []
        parts: dict[str, Any] = {name: Written(name, getattr(running, name), log, {}) for name in WATCHED}
        Session(replace(running, **parts)).drain()
        assert log == ["scheduler.urgent", "pipeline.drain", "agreement.wait", "mode.wait"]


def test_the_docstring_names_the_events_in_this_order() -> None:
    text = Session.on_step_end.__doc__ or ""
    steps = text[text.index("1. ``") :]
    named = [e for e in STEP if f"``{e}``" in steps]
    assert len(named) >= 15
    places = [steps.index(f"``{e}``") for e in named]
    assert places == sorted(places)
