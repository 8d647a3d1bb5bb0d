# SPDX-License-Identifier: Apache-2.0
"""When a checkpoint is written from memory, what is held back for it, and what its failure costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from session_job import Adapter, Job

from megatron_moetion.observe.journal import Journal
from megatron_moetion.persist.saver import HOLD_S, START_S, NoWriter, Releases, Saver
from megatron_moetion.persist.tracker import write_tracker
from megatron_moetion.store.retention import Settled
from megatron_moetion.units import Inventory


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def unix_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Writer:
    """A process that does as it is told by the test."""

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        self.told: list[dict[str, Any]] = []
        self.says: list[dict[str, Any]] = []
        self.ended: str | None = None
        self.takes = True
        self.is_closed = False
        self.ends_within = 0.0
        self.while_asked: Callable[[], None] = lambda: None

    def send(self, message: Mapping[str, Any]) -> bool:
        self.told.append(dict(message))
        return self.takes

    def hear(self) -> list[dict[str, Any]]:
        self.while_asked()
        said, self.says = self.says, []
        return said

    def kill(self) -> None:
        self.ended = "signal 9"

    def end(self, limit_s: float) -> None:
        self.ends_within = limit_s

    def close(self) -> None:
        self.is_closed = True

    def ready(self) -> None:
        self.says.append({"what": "ready", "iteration": -1, "root": "/disk"})

    def copied(self, iteration: int) -> None:
        self.says.append({"what": "copied", "iteration": iteration})

    def saved(self, iteration: int) -> None:
        figures = {"nbytes": 1 << 20, "copy_s": 0.5, "seconds": 9.0, "folder": f"/disk/iter_{iteration:07d}"}
        self.says.append({"what": "saved", "iteration": iteration, **figures})

    def failed(self, iteration: int, why: str) -> None:
        self.says.append({"what": "failed", "iteration": iteration, "why": why})


class Setting:
    """A saver, its writers, and what it has said."""

    def __init__(self, folder: Path, *, interval: int = 10, written: int = -1, speaks: bool = True) -> None:
        self.clock = Clock()
        self.writers: list[Writer] = []
        self.report = folder / "report.jsonl"
        self.saver = Saver(
            interval=interval,
            written=written,
            state_bytes=0,
            limit_s=1000.0,
            free_bytes=lambda: 1 << 40,
            start_writer=self.start,
            journal=Journal(0, 0, self.report, self.clock),
            clock=self.clock,
            speaks=speaks,
            grace_s=0,
            end=lambda code: None,
        )

    def start(self) -> Writer:
        self.writers.append(Writer())
        return self.writers[-1]

    @property
    def writer(self) -> Writer:
        return self.writers[-1]

    def learn(self, *stable: int) -> Settled | None:
        """One step, with these results."""
        for each in stable:
            self.saver.learn(Settled(stable=each, whole={each: True}))
        return self.saver.take()

    @property
    def events(self) -> list[tuple[str, int]]:
        lines = self.report.read_text().splitlines()
        return [(e["event"], e["iteration"]) for e in map(json.loads, lines)]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def told(writer: Writer) -> list[tuple[str, int]]:
    return [("save" if m["why"] is None else "leave_out", m["iteration"]) for m in writer.told if "is_over" not in m]


def test_without_a_saver_everything_is_released_at_once() -> None:
    releases = Releases()
    assert releases.take() is None
    releases.learn(Settled(stable=1, whole={1: True}))
    releases.learn(Settled(stable=2, whole={2: True}))
    assert releases.take() == Settled(stable=2, whole={1: True, 2: True})
    assert releases.take() is None


def test_what_follows_the_iteration_is_held_until_the_writer_has_its_copy(setting: Setting) -> None:
    assert setting.learn(9) is not None
    assert told(setting.writer) == []
    assert setting.learn(10) == Settled(stable=10, whole={10: True}), "what comes before it goes"
    assert told(setting.writer) == [("save", 10)]
    assert setting.learn(11) is None
    assert setting.learn(12, 13) is None
    setting.writer.copied(10)
    assert setting.learn() == Settled(stable=13, whole={11: True, 12: True, 13: True})
    assert setting.learn(14) == Settled(stable=14, whole={14: True})
    setting.writer.saved(10)
    assert setting.learn(20) is not None
    assert told(setting.writer) == [("save", 10), ("save", 20)]
    assert setting.events == [("saved", 10)]


@pytest.mark.parametrize(
    "heard", [[[9], [10], [11], [12]], [[9, 10, 11, 12]], [[9, 10], [11, 12]], [[9], [10, 11, 12]]]
)
def test_ranks_choose_the_same_iteration_however_results_come(tmp_path: Path, heard: list[list[int]]) -> None:
    setting = Setting(tmp_path)
    released = [setting.learn(*results) for results in heard]
    assert told(setting.writer) == [("save", 10)]
    assert max(r.stable for r in released if r is not None) == 10, "captures of 10 are still there"


def test_where_the_multiple_was_never_stable_the_next_iteration_is_written(setting: Setting) -> None:
    setting.learn(8)
    setting.learn(13)
    setting.writer.saved(13)
    setting.learn(19)
    setting.learn(20)
    assert told(setting.writer) == [("save", 13), ("save", 20)]


@pytest.mark.parametrize(("written", "first"), [(-1, 10), (0, 10), (10, 20), (14, 20)])
def test_a_restart_goes_on_from_what_is_on_disk(tmp_path: Path, written: int, first: int) -> None:
    setting = Setting(tmp_path, written=written)
    for iteration in range(1, 31):
        setting.learn(iteration)
        setting.writer.saved(iteration)
    assert told(setting.writer)[0] == ("save", first)


def test_a_checkpoint_that_a_fault_cut_short_is_written_after_the_restart(tmp_path: Path) -> None:
    setting = Setting(tmp_path, written=10)
    setting.learn(24)  # recovered to 23; 20 is not on disk
    assert told(setting.writer) == [("save", 24)]


@pytest.mark.parametrize("comes_up", [True, False])
def test_a_copy_that_takes_too_long_keeps_nothing_for_ever(setting: Setting, comes_up: bool) -> None:
    setting.learn(10)
    assert setting.learn(11) is None
    setting.clock.now += HOLD_S + 1
    if comes_up:
        setting.writer.ready()
    assert setting.learn() is None, "the writer was only just starting"
    setting.clock.now += (HOLD_S if comes_up else START_S) + 1
    assert setting.learn() == Settled(stable=11, whole={11: True})
    setting.writer.failed(10, "its captures were released")
    setting.learn(20)
    assert told(setting.writer) == [("save", 10), ("save", 20)]
    assert setting.events == [("save_failed", 10)]


def test_a_save_that_is_still_under_way_costs_the_next_one_and_holds_nothing(setting: Setting) -> None:
    setting.learn(10)
    setting.writer.copied(10)
    setting.learn(19)
    assert setting.learn(20) is not None
    assert setting.learn(21) is not None, "there is no copy to wait for"
    assert told(setting.writer) == [("save", 10), ("leave_out", 20)]
    assert setting.events == [("save_failed", 20)]
    setting.writer.saved(10)
    setting.learn(30)
    assert told(setting.writer)[-1] == ("save", 30)


@pytest.mark.parametrize("when", ["copying", "writing"])
def test_a_process_that_ends_costs_its_checkpoint_and_another_one_is_started(setting: Setting, when: str) -> None:
    setting.learn(10)
    if when == "writing":
        setting.writer.copied(10)
    setting.writer.ended = "signal 9"
    assert setting.learn(11) == Settled(stable=11, whole={11: True})
    assert setting.events == [("save_failed", 10)]
    assert told(setting.writer) == [("leave_out", 10)], "so that the processes of other ranks hear of it"
    setting.learn(20)
    assert len(setting.writers) == 2
    assert told(setting.writer) == [("leave_out", 10), ("save", 20)]


def test_a_writer_that_hangs_is_ended_and_said_and_another_one_goes_on(setting: Setting) -> None:
    setting.learn(10)
    setting.writer.copied(10)
    setting.learn(20)
    assert setting.events == [("save_failed", 20)], "at once"
    setting.clock.now += 1100.0
    setting.learn(21)
    assert setting.writer.ended == "signal 9"
    assert setting.events == [("save_failed", 20), ("save_failed", 10)]
    setting.learn(30)
    assert len(setting.writers) == 2
    assert told(setting.writer) == [("save", 30)]


def test_a_late_word_of_an_older_checkpoint_does_not_touch_the_next(setting: Setting) -> None:
    setting.learn(10)
    setting.learn(20)
    setting.writer.saved(10)
    setting.learn(30)
    setting.writer.failed(20, "that of iteration 10 is not done yet")
    assert setting.learn(31) is None, "30 is still being copied"
    setting.writer.copied(30)
    setting.writer.saved(30)
    assert setting.learn(32) is not None
    assert setting.events == [("save_failed", 20), ("saved", 10), ("saved", 30)]


def test_a_process_that_takes_nothing_costs_its_checkpoint(setting: Setting) -> None:
    setting.writer.takes = False
    setting.learn(10)
    assert setting.learn(11) is not None
    assert setting.events == [("save_failed", 10)]


def test_the_end_waits_for_what_is_being_written_and_not_for_ever(setting: Setting) -> None:
    setting.learn(10)
    polls = iter(range(1000))
    setting.writer.while_asked = lambda: setting.writer.saved(10) if next(polls) == 30 else None
    setting.saver.finish(60.0)
    assert 1.0 < setting.clock.now < 3.0
    setting.learn(20)
    setting.writer.while_asked = lambda: None
    began = setting.clock.now
    setting.saver.finish(60.0)
    assert 60.0 <= setting.clock.now - began < 61.0
    setting.saver.close()
    assert setting.writer.is_closed


def test_while_the_last_checkpoint_is_written_nothing_is_released(setting: Setting) -> None:
    assert setting.learn(1) is not None
    setting.saver._end(5.0)  # by the thread that a signal wakes; training goes on meanwhile
    assert setting.writer.ends_within == 5.0
    assert setting.learn(2) is None
    assert setting.learn(3) is None


def test_a_process_that_cannot_be_started_costs_checkpoints_and_is_tried_again(setting: Setting) -> None:
    processes = iter([NoWriter("it cannot be started: no memory"), NoWriter("it cannot be started: no memory")])
    setting.saver._writer = next(processes)
    setting.saver._start_writer = lambda: next(processes, None) or setting.start()
    assert setting.learn(10) is not None
    assert setting.learn(11) is not None, "nothing is held for nobody"
    assert setting.events == [("save_failed", 10)]
    setting.learn(20)
    assert told(setting.writer) == [("save", 20)]


def test_only_rank_0_speaks_for_all(tmp_path: Path) -> None:
    setting = Setting(tmp_path, speaks=False)
    setting.learn(10)
    setting.writer.saved(10)
    setting.learn(20)
    setting.writer.failed(20, "no space")
    setting.learn(21)
    assert setting.events == []


def test_without_an_interval_nothing_is_written_until_the_job_is_ended(tmp_path: Path) -> None:
    setting = Setting(tmp_path, interval=0)
    for iteration in range(1, 40):
        assert setting.learn(iteration) is not None
    assert told(setting.writer) == []


# -- in a session --------------------------------------------------------------------------------------------


class Guided(Adapter):
    """State that a checkpoint on disk has places for."""

    problem = "null"

    def inventory(self) -> Inventory:
        return replace(super().inventory(), guide=f'{{"problem": {self.problem}}}')


class Unguided(Guided):
    problem = '"a matrix of another world"'


def job(folder: Path, writers: list[Writer], mode: str = "full", state: type[Adapter] = Guided) -> Job:
    def start(settings: Mapping[str, Any]) -> Writer:
        writers.append(Writer(settings))
        return writers[-1]

    return Job(
        folder / "store", state=state, mode=mode, host={"start_writer": start}, save=str(folder / "disk"),
        save_interval=4,
    )  # fmt: skip


def test_a_session_keeps_the_iteration_in_its_arenas_and_training_goes_on(tmp_path: Path) -> None:
    writers: list[Writer] = []
    made = job(tmp_path, writers)
    made.start()
    assert len(writers) == 2
    assert {w.settings["rank"] for w in writers if w.settings is not None} == {0, 1}
    assert len({w.settings["history"] for w in writers if w.settings is not None}) == 1
    assert all(s.writes_checkpoints for s in made.sessions)
    made.train(12)
    assert [told(w) for w in writers] == [[("save", 4)]] * 2
    arenas = [s.running.arenas.own for s in made.sessions]
    assert [arena.page.stable for arena in arenas] == [4, 4]
    assert all(4 in arena.page.records.table["iteration"] for arena in arenas)
    for writer in writers:
        writer.copied(4)
    made.train(6)
    assert all(session.stable_iteration > 12 for session in made.sessions), "what was held back is released"
    assert all(session.running.agreement.stable > 14 for session in made.sessions)
    for session in made.sessions:
        session.abandon()
    assert all(w.is_closed for w in writers)


def test_what_is_on_disk_beyond_where_a_run_begins_does_not_keep_it_from_saving(tmp_path: Path) -> None:
    """Of another run, or from before it went back."""
    (tmp_path / "disk").mkdir()
    write_tracker(tmp_path / "disk", 5000)
    writers: list[Writer] = []
    made = job(tmp_path, writers)
    made.start()
    made.train(6)
    assert [told(w) for w in writers] == [[("save", 4)]] * 2


def test_a_run_begins_although_no_process_can_be_started(tmp_path: Path) -> None:
    def start(settings: Mapping[str, Any]) -> Writer:
        raise OSError("out of memory")

    made = Job(
        tmp_path / "store", state=Guided, host={"start_writer": start}, save=str(tmp_path / "disk"), save_interval=2
    )
    made.start()
    made.train(5)
    assert all(session.stable_iteration >= 3 for session in made.sessions)


@pytest.mark.parametrize(("mode", "state"), [("popularity", Guided), ("full", Unguided)])
def test_state_that_cannot_be_written_from_memory_is_left_to_training(
    tmp_path: Path, mode: str, state: type[Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    writers: list[Writer] = []
    with caplog.at_level("INFO", "megatron_moetion"):
        made = job(tmp_path, writers, mode, state)
        made.start()
    assert not writers
    assert not any(s.writes_checkpoints for s in made.sessions)
    (line,) = [r.message for r in caplog.records if "training writes the checkpoints" in r.message]
    assert ("older than the iteration" if mode == "popularity" else "a matrix of another world") in line
