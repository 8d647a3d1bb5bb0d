# SPDX-License-Identifier: Apache-2.0
"""Parents that fork ranks again: what they decide, and what three of them do, with real processes and a real store."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.warm import stay as beginning
from megatron_moetion.warm import waiting
from megatron_moetion.warm.board import AGAIN, ENDED, LEAVE, exit_code_of, verdict
from megatron_moetion.warm.launch import Launch
from megatron_moetion.warm.stay import stay

ROOT = Path(__file__).parents[2]
MEET_S = 20.0
"""For parents to meet where all of them come: a machine with much to do loses connections, for a second each."""
SHORT_S = 4.0
"""Where one does not come."""


@pytest.mark.parametrize(
    ("code", "left", "expected"),
    [
        (0, 3, ENDED), (0, 0, ENDED), (-9, 1, AGAIN), (-11, 1, AGAIN), (-6, 1, AGAIN), (1, 1, AGAIN), (4, 1, AGAIN),
        (5, 1, AGAIN), (-9, 0, LEAVE), (1, 0, LEAVE), (2, 3, LEAVE), (3, 3, LEAVE), (16, 3, LEAVE), (17, 3, LEAVE),
    ],
)  # fmt: skip
def test_what_the_end_of_a_rank_means(code: int, left: int, expected: str) -> None:
    assert verdict(code, restarts_left=left) == expected


def test_a_signal_has_a_shells_number() -> None:
    assert [exit_code_of(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]


def test_a_rank_is_told_what_the_launcher_would_have_said() -> None:
    environ = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    launch = Launch(rank=0, world_size=1, environ=environ, limit=4, timeout=timedelta(seconds=1))
    assert launch.environment_of(1) == {"TORCHELASTIC_RESTART_COUNT": "11", "TORCHELASTIC_MAX_RESTARTS": "19"}


def alone(environ: dict[str, str]) -> int:
    def program() -> NoReturn:
        raise AssertionError("no rank is forked")

    return stay(program, Launch(rank=0, world_size=2, environ=environ, limit=1, timeout=timedelta(seconds=1)))


def test_without_a_launcher_there_is_nobody_to_agree_with() -> None:
    with pytest.raises(ConfigError, match="start with torchrun"):
        alone({})


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ChannelError, match=f"no store can be opened at 127.0.0.1:{port}"):
            alone({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def test_a_cuda_context_of_the_parent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="has called CUDA"):
        alone({"MASTER_ADDR": "127.0.0.1"})


@pytest.mark.parametrize(("answer", "expected"), [(0, True), (3, False), (100, True)])
def test_the_driver_is_asked_whether_anything_has_called_cuda(
    monkeypatch: pytest.MonkeyPatch, answer: int, expected: bool
) -> None:
    """3 is what CUDA's driver says before anybody has initialised it."""
    driver = SimpleNamespace(cuDeviceGetCount=lambda count: answer)
    monkeypatch.setattr(beginning.ctypes, "CDLL", lambda name: driver)
    assert beginning.has_called_cuda() is expected


@dataclass(frozen=True)
class Outcome:
    codes: list[int | None]
    first: int
    seconds: float
    output: str
    folder: Path

    def ranks(self, generation: int) -> list[int]:
        """Process ids of those that began."""
        return [int(path.read_text()) for path in sorted(self.folder.glob(f"{generation}.?"))]

    @property
    def generations(self) -> int:
        return len({path.name.split(".")[0] for path in self.folder.glob("?.?")})

    def assert_left_to_the_launcher(self, killed: dict[int, int]) -> None:
        """Of ranks that end at about the same time, the first one may have had the others ended."""
        assert {n: code for n, code in enumerate(self.codes) if n in killed} == killed
        assert {code for n, code in enumerate(self.codes) if n not in killed} in ({1}, {1, 143})
        assert self.generations == 1
        assert "not all ranks can be started again from warm parents" in self.output

    def assert_nothing_is_left(self) -> None:
        pids = [int(path.read_text()) for path in self.folder.glob("?.?")]
        deadline = time.monotonic() + 5
        while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left


def launch(
    folder: Path,
    acts: dict[str, str],
    *,
    limit: int = 3,
    signals: Sequence[Any] = (),
    launcher_has_store: bool = True,
    standbys: int = 0,
    meet_s: float = MEET_S,
) -> Outcome:
    settings = json.dumps(
        {
            "acts": acts,
            "limit": limit,
            "signals": signals,
            "launcher_has_store": launcher_has_store,
            "standbys": standbys,
            "meet_s": meet_s,
        }
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("warm_launch.py")), str(folder), settings],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    print(done.stdout, done.stderr[-6000:])  # which pytest shows where a test fails
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    return Outcome(found["codes"], found["first"], found["seconds"], done.stdout + done.stderr, folder)


@pytest.mark.parametrize("launcher_has_store", [True, False])
def test_a_killed_rank_brings_all_ranks_back(tmp_path: Path, launcher_has_store: bool) -> None:
    """Where torchrun shares no store, or SLURM starts ranks, rank 0's parent has one hosted that outlives ranks."""
    outcome = launch(tmp_path, {"0": "wait", "0:1": "kill"}, launcher_has_store=launcher_has_store)
    assert outcome.codes == [0, 0, 0]
    assert outcome.generations == 2
    assert not set(outcome.ranks(0)) & set(outcome.ranks(1))
    assert re.search(
        r"rank 1 on \S+ has ended with SIGKILL; the ranks start again from warm parents \(1 of 3\)", outcome.output
    )
    outcome.assert_nothing_is_left()


def test_faults_one_after_the_other_and_on_several_ranks_at_once(tmp_path: Path) -> None:
    acts = {"0": "kill", "1": "wait", "1:0": "exit 1", "2": "wait", "2:2": "kill", "2:1": "end"}
    outcome = launch(tmp_path, acts)
    assert outcome.codes == [0, 0, 0]
    assert outcome.generations == 4
    outcome.assert_nothing_is_left()


def test_after_so_many_restarts_the_launcher_has_its_turn(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "wait", "0:1": "kill", "1": "wait", "1:2": "kill"}, limit=1)
    assert outcome.codes == [143, 143, 137]
    assert outcome.generations == 2
    outcome.assert_nothing_is_left()


def test_a_mistake_is_not_repeated(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "wait", "0:1": "exit 2"})
    assert outcome.codes == [143, 2, 143]
    assert outcome.generations == 1
    assert outcome.first == 1, "launchers name the one that ends first"


def test_a_rank_that_has_done_its_work_comes_back_for_one_that_has_not(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "end", "0:1": "late exit 1"})
    assert outcome.codes == [0, 0, 0]
    assert outcome.generations == 2


def test_a_rank_whose_parent_is_told_to_end_is_told_and_nobody_waits_for_it(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "late exit 1", "0:1": "exit when told"}, signals=[["SIGTERM", 1]])
    assert outcome.codes == [1, 9, 1]
    assert outcome.generations == 1
    assert (tmp_path / "told").exists(), "what it has started is told too"
    assert outcome.seconds < MEET_S
    outcome.assert_nothing_is_left()


def test_other_signals_reach_the_rank_and_end_nothing_by_themselves(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "late exit 0", "0:1": "note and end"}, signals=[["SIGUSR1", 1]])
    assert outcome.codes == [0, 0, 0]
    assert (tmp_path / "noted").exists()


@pytest.mark.parametrize("end", ["exit when told", "end when told"])
def test_ranks_that_all_end_well_leave_nobody_waiting_for_one_that_was_told_to_end(tmp_path: Path, end: str) -> None:
    """Megatron's ranks tell each other of a signal that one of them got, save, and leave with 0."""
    outcome = launch(tmp_path, {"0": "late exit 0", "0:1": end}, signals=[["SIGTERM", 1]])
    assert outcome.codes == [0, 0 if end == "end when told" else 9, 0]
    assert outcome.seconds < MEET_S


def test_a_listener_that_is_killed_is_replaced(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "wait", "0:1": "late exit 1"}, signals=[["SIGKILL", "listeners"]])
    assert outcome.codes == [0, 0, 0]
    assert outcome.generations == 2


def test_a_store_that_hangs_holds_nobody_for_ever(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "late exit 1"}, signals=[["SIGSTOP", "store"]])
    assert outcome.codes == [1, 1, 1]
    assert outcome.output.count("the launcher's store does not take it") == 3
    assert outcome.seconds < 20


def test_a_parent_that_is_killed_takes_its_rank_with_it_and_costs_the_others_a_bounded_wait(tmp_path: Path) -> None:
    outcome = launch(tmp_path, {"0": "late exit 1", "0:1": "wait"}, signals=[["SIGKILL", 1]], meet_s=SHORT_S)
    outcome.assert_left_to_the_launcher({1: -9})
    outcome.assert_nothing_is_left()


@pytest.mark.parametrize(("act", "code"), [("late exit 0", 0), ("late exit 1", 1)])
def test_without_the_launchers_store_ranks_go_on_to_their_end(tmp_path: Path, act: str, code: int) -> None:
    outcome = launch(tmp_path, {"0": act}, signals=[["SIGKILL", "store"]])
    assert outcome.codes == [code] * 3
    assert outcome.generations == 1
    assert outcome.output.count("the launcher's store does not take it") == 3


def test_a_standby_takes_the_place_of_a_lost_machine_and_another_one_that_of_the_standby(tmp_path: Path) -> None:
    """Each machine has one rank. The second fault comes before the first one's ranks have done anything."""
    acts = {"0": "late exit 1", "0:1": "lose", "1": "wait", "1:0": "kill", "2": "late exit 1", "2:1": "lose"}
    outcome = launch(tmp_path, acts, standbys=2)
    assert [outcome.codes[n] for n in (0, 1, 2)] == [0, -9, 0]
    assert sorted(code if code is not None else 1 for code in outcome.codes[3:]) == [0, 137]
    assert outcome.generations == 4
    first = outcome.codes[3:].index(137)
    assert [(tmp_path / f"standby{n}").read_text() for n in (first, 1 - first)] == ["node1", f"spare{first}"]
    assert len(re.findall(r"takes the place of \S+ \(ranks 1-1\)", outcome.output)) == 2
    outcome.assert_nothing_is_left()


def test_a_standby_that_is_lost_while_it_waits_leaves_all_as_without_one(tmp_path: Path) -> None:
    acts = {"0": "late exit 1", "0:1": "wait"}
    outcome = launch(tmp_path, acts, signals=[["SIGKILL", 3], ["SIGKILL", 1]], standbys=1, meet_s=SHORT_S)
    outcome.assert_left_to_the_launcher({1: -9, 3: -9})
    outcome.assert_nothing_is_left()


def test_a_machine_that_answers_too_late_has_lost_its_place_and_ends_with_the_job(tmp_path: Path) -> None:
    acts = {"0": "late exit 1", "0:1": "wait", "1": "late exit 0"}
    signals = [["SIGSTOP", "listener of 1"], ["SIGCONT", "listener of 1", "standby0"]]
    outcome = launch(tmp_path, acts, signals=signals, standbys=1)
    assert outcome.codes == [0, 0, 0, 0]
    assert outcome.generations == 2
    assert "this machine did not answer in time after a fault" in outcome.output
    assert (tmp_path / "1.1").exists()
    outcome.assert_nothing_is_left()


def test_who_watches_machines_can_say_that_one_is_lost(tmp_path: Path) -> None:
    """Ranks that wait for a machine without power notice it late."""
    outcome = launch(tmp_path, {"0": "wait"}, signals=[["SIGKILL", 1], ["SIGUSR1", 3]], standbys=1)
    assert outcome.codes == [0, -9, 0, 0]
    assert outcome.generations == 2
    assert "a machine shows no sign of life; the ranks start again from warm parents" in outcome.output
    outcome.assert_nothing_is_left()


def test_a_standby_needs_a_store_and_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {"RANK": "3"}
    waiting.await_job(environ)
    assert environ == {"RANK": "3"}
    with pytest.raises(ConfigError, match="MOETION_RENDEZVOUS is not"):
        waiting.await_job({"MOETION_STANDBY": "note"})
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(waiting, "BEGIN_S", 0.3)
    with pytest.raises(ChannelError, match=rf"no job has begun at 127.0.0.1:{store.port} within 0 s"):
        waiting.await_job({"MOETION_STANDBY": "note", "MOETION_RENDEZVOUS": f"127.0.0.1:{store.port}"})
