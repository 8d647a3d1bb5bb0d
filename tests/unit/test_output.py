# SPDX-License-Identifier: Apache-2.0
"""What tells of training never stops it: a full disk costs what is told, a mistake shows before iteration 1."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fabrics import loopback_fabrics
from support import ToyState

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.observe import trace as trace_module
from megatron_moetion.observe.journal import Journal
from megatron_moetion.observe.trace import Trace
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.starter import Starter
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.session import Session


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_moetion"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron_moetion")
    return caplog


def full(path: Path) -> Path:
    """A file on a disk that is full."""
    path.symlink_to("/dev/full")
    return path


@pytest.mark.parametrize("what", ["trace", "report"])
def test_a_full_disk_costs_what_is_told_and_no_snapshot(
    what: str, tmp_path: Path, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "BUFFERED", 5)
    path = full(tmp_path / "told")
    trace = Trace(path, 0) if what == "trace" else None
    state, clock = ToyState(), SystemClock()
    if trace is not None:
        trace.open()
    prepared = prepare(
        config=MoetionConfig(
            mode="full", run_id="r", store=str(tmp_path / "store"), replicas=0, pack_threads=1,
            report=str(path) if what == "report" else "", state_hash_interval=2,
        ),
        adapter=state,
        blueprint=FullBlueprint(),
        fabric=loopback_fabrics(1)[0],
        topology="toy",
        scheduler=Scheduler(
            "bubble", HostStopwatch(clock), clock=clock, condition=threading.Condition(), eager_slice_bytes=1 << 20,
            draw=trace.add if trace else no_drawing,
        ),
        host=Host(environment={}),
    )  # fmt: skip
    session = Session(Starter(prepared).start()[0])
    for iteration in range(1, 21):
        session.before_optimizer_step()
        state.step(iteration)
        session.on_step_end(iteration)
        session.drain()
    assert session.scalars()["moetion/snapshots-dropped"] == 0
    session.close()
    if trace is not None:
        trace.close()
    said = [m for m in lines.messages if "No space left on device" in m]
    assert len(said) == 1
    assert f"nothing more is written to {path}" in said[0]


def opened(trace: Trace) -> Trace:
    trace.open()
    return trace


MAKERS: list[Callable[[Path, int], object]] = [
    lambda folder, attempt: Journal(3, attempt, folder / "new" / "events.jsonl", SystemClock()),
    lambda folder, attempt: opened(Trace(folder / "new" / "a.trace.json", 3, attempt)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_folder_that_cannot_be_used_is_a_mistake_where_a_job_begins(
    make: Callable[[Path, int], object], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"rank 3: --moetion-(report|trace-dir): .*file/new/.* cannot be written"):
        make(tmp_path / "file", 0)


@pytest.mark.parametrize("make", MAKERS)
def test_and_no_reason_not_to_restart(
    make: Callable[[Path, int], object], tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    made = make(tmp_path / "file", 1)
    if isinstance(made, Journal):
        made.event("summary")
    if isinstance(made, Trace):
        made.add("compute", 1.0, 2.0, 0)
        made.close()
    assert [m for m in lines.messages if "nothing more is written" in m] == lines.messages
    assert len(lines.messages) == 1


class Full(io.StringIO):
    """A stream into a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_on_a_full_disk_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("megatron_moetion")
    monkeypatch.setattr(logger, "propagate", False)
    handler = logging.StreamHandler(Full())
    logger.addHandler(handler)
    try:
        Journal(0, 0, None, SystemClock()).warn_once("late", 1, "late")
        opened(Trace(Path("/dev/full"), 0)).close()
    finally:
        logger.removeHandler(handler)
