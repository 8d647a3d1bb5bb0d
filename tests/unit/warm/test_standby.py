# SPDX-License-Identifier: Apache-2.0
"""A machine that stands by, from the job's beginning to a lost machine's place; its errands run in this process.

``tests/unit/test_warm.py`` has the processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch import distributed as dist

from megatron_moetion.config import STANDBY
from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.warm import own, standby, waiting
from megatron_moetion.warm.board import AGAIN, ALL, ENDED, LEAVE, LEFT, SHORT, TAKEN, Board
from megatron_moetion.warm.launch import Launch, publish
from megatron_moetion.warm.standby import Standby
from megatron_moetion.warm.waiting import await_job

LIMIT = 2


class Inline:
    """An errand that is done at once."""

    def __init__(self, act: Callable[[Callable[[str], None]], None]) -> None:
        self._said = ""
        act(self._say)

    def _say(self, text: str) -> None:
        self._said = text

    def hear(self) -> str:
        return self._said

    def hear_within(self, limit_s: float) -> str:
        return self._said


@dataclass(frozen=True)
class Job:
    """Two machines with two ranks each, whose store is the rendezvous store too."""

    environ: dict[str, str]

    def launch(self, rank: int) -> Launch:
        ours = self.environ | waiting.place(rank, rank % 2, 2) | {"SLURMD_NODENAME": f"node{rank // 2}"}
        return Launch(rank=rank, world_size=4, environ=ours, limit=LIMIT, timeout=timedelta(seconds=20))

    def begin(self, token: str) -> Callable[[int], Board]:
        for rank in (0, 2):
            self.launch(rank).name(token)
        publish(self.launch(0), token)
        return self.launch(0).boards(token)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setattr(waiting, "Errand", Inline)
    monkeypatch.setattr(standby, "Errand", Inline)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield Job({
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "UNRELATED": "node0's",
        "MOETION_RENDEZVOUS": f"127.0.0.1:{store.port}",
    })  # fmt: skip
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


class Served(Standby):
    """Says what it would serve."""

    found: tuple[Launch, int, str]

    def _serve(self, launch: Launch, generation: int, taken: str) -> int:
        self.found = (launch, generation, taken)
        return 7


def program() -> NoReturn:
    raise AssertionError("no rank is forked")


def stand_by(job: Job, note: Path) -> Served:
    """As the program of a standby does it."""
    environ = {STANDBY: str(note), "MOETION_RENDEZVOUS": job.environ["MOETION_RENDEZVOUS"], "SLURMD_NODENAME": "spare"}
    await_job(environ)
    assert environ["RANK"] == environ["LOCAL_RANK"] == "0"
    assert environ["WORLD_SIZE"] == "4"
    assert "UNRELATED" not in environ
    return Served(program, Launch(
        rank=0, world_size=4, environ=environ, limit=LIMIT, timeout=timedelta(seconds=5), meet_s=1, answer_s=0.1
    ))  # fmt: skip


def test_it_waits_for_the_place_of_a_lost_machine(job: Job, tmp_path: Path) -> None:
    board_of = job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    board_of(0).tell(f"{AGAIN} rank 0 has ended")
    board_of(0).keep(0)
    assert found.run() == 7
    launch, generation, taken = found.found
    assert (generation, taken) == (0, f"{TAKEN} 1 node1")
    assert launch.environ["MASTER_PORT"] == job.environ["MASTER_PORT"]
    assert job.launch(0).rename(1, "0-a") == "spare", "the next standby knows whose place it takes"
    assert not board_of(0).keep(1)


@pytest.mark.parametrize("event", [f"{LEAVE} rank 1 has ended with exit code 2", LEFT])
def test_it_stands_by_for_the_launchers_next_attempt(job: Job, tmp_path: Path, event: str) -> None:
    board_of = job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    board_of(0).tell(event)
    again = job.begin("1-b")
    again(0).tell(AGAIN)
    again(0).keep(1)
    assert found.run() == 7
    assert found.found[2] == f"{TAKEN} 0 node0"


def test_it_ends_with_the_job(job: Job, tmp_path: Path) -> None:
    board_of = job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    board_of(0).tell(ENDED)
    assert found.run() == 0


def test_a_store_that_does_not_answer_once_costs_a_moment_and_not_the_launch(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch goes on: to wait for a newer one would be to stand by for nothing."""
    board_of = job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    monkeypatch.setattr(standby, "_PAUSE_S", 0.0)
    follow, calls = found._follow, []

    def once_in_vain(launch: Launch, generation: int) -> str:
        calls.append(generation)
        if len(calls) == 1:
            board_of(0).tell(ENDED)
            raise RuntimeError("connection reset")
        return follow(launch, generation)

    monkeypatch.setattr(found, "_follow", once_in_vain)
    assert found.run() == 0
    assert calls == [0, 0]


def test_a_job_of_another_size_is_refused(job: Job, tmp_path: Path) -> None:
    job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    replace(job, environ=job.environ | {"WORLD_SIZE": "2"}).begin("1-b")
    with pytest.raises(ConfigError, match="the job has 2 ranks now, and this machine stands by for one of 4"):
        found.run()


def test_a_store_that_is_gone_is_said(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.begin("0-a")
    found = stand_by(job, tmp_path / "note")
    monkeypatch.setattr(found, "_published", lambda after: "")
    with pytest.raises(ChannelError, match=r"the job's rendezvous store at \S+ is gone"):
        found.run()


@pytest.mark.parametrize(("generations", "word"), [(0, AGAIN), (1, AGAIN), (2, LEAVE)])
def test_an_alarm_is_for_the_present_generation(job: Job, generations: int, word: str) -> None:
    board_of = job.begin("0-a")
    for generation in range(generations):
        board_of(generation).tell(AGAIN)
        board_of(generation)._store.set("meeting", ALL)
    standby._tell_lost(board_of, LIMIT)
    assert board_of(generations).await_event(1) == f"{word} a machine shows no sign of life"


@pytest.mark.parametrize("meeting", ["", SHORT])
def test_an_alarm_says_nothing_while_ranks_are_being_replaced(job: Job, meeting: str) -> None:
    """Two machines that notice a loss one after the other must not cost two restarts."""
    board_of = job.begin("0-a")
    board_of(0).tell(f"{AGAIN} rank 1 has ended")
    if meeting:
        board_of(0)._store.set("meeting", meeting)
    standby._tell_lost(board_of, LIMIT)
    assert not board_of(1).has_event()


def test_a_program_of_ones_own_runs_here_without_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    with pytest.raises(SystemExit) as ended:
        own.run_warm(lambda: done.append(os.getpid()), restarts=0)
    assert ended.value.code == 0
    assert done == [os.getpid()]


def test_what_a_program_of_ones_own_cannot_have_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # put back afterwards
    for restarts, said in ((-1, r"restarts=-1"), (3, "start with torchrun")):
        with pytest.raises(SystemExit) as ended:
            own.run_warm(lambda: None, restarts=restarts)
        assert ended.value.code == ConfigError.exit_code
        assert said in capsys.readouterr().err
