# SPDX-License-Identifier: Apache-2.0
"""Faults strike the named rank at the named point of the named attempt, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_moetion.errors import ConfigError
from megatron_moetion.observe.fault import POINTS, Fault, make_probe, parse_faults


def test_faults_are_parsed() -> None:
    assert parse_faults("") == ()
    assert parse_faults("0:1:7:mid-pack,1:0:-1:survey") == (
        Fault(attempt=0, rank=1, iteration=7, point="mid-pack"),
        Fault(attempt=1, rank=0, iteration=-1, point="survey"),
    )
    assert parse_faults("0:1:7:fetch:SIGSTOP") == (
        Fault(attempt=0, rank=1, iteration=7, point="fetch", kind="SIGSTOP"),
    )


@pytest.mark.parametrize(
    "text", ["0:1:7", "0:1:7:nowhere", "0:1:7:mid-pack:more", "0:1:7:mid-pack:SIGKILL:", "a:1:7:mid-pack"]
)
def test_a_mistake_is_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_faults(text)


def test_a_probe_kills_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    faults = parse_faults("1:0:7:mid-pack,1:0:-1:fetch")
    for attempt, rank in ((0, 0), (1, 1)):
        probe = make_probe(faults, attempt, rank)
        for point in POINTS:
            probe(point, 7)
    assert killed == []
    probe = make_probe(faults, 1, 0)
    probe("mid-pack", 6)
    probe("before-select", 7)
    assert killed == []
    probe("mid-pack", 7)
    probe("fetch", 3)
    assert killed == [(os.getpid(), signal.SIGKILL)] * 2
    probe("mid-pack", 7)
    assert len(killed) == 2, "a fault that is over does not come again"


def test_a_fault_waits_for_the_first_iteration_that_reaches_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that is dropped reaches no point; a run whose faults never struck would prove nothing."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    probe = make_probe(parse_faults("0:0:9:mid-pack:SIGTERM,0:0:6:mid-pack,0:0:6:survey"), 0, 0)
    probe("survey", -1)
    assert killed == [signal.SIGKILL], "phases of a recovery have no iteration"
    killed.clear()
    probe("mid-pack", 5)
    assert killed == []
    probe("mid-pack", 8)
    probe("mid-pack", 8)
    assert killed == [signal.SIGKILL], "the other one is of a later iteration"
    probe("mid-pack", 10)
    assert killed == [signal.SIGKILL, signal.SIGTERM]


def hurt(kind: str) -> tuple[int, str]:
    """What ends a process that is hurt so, and what it says."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has it ignored
        "from megatron_moetion.observe.fault import make_probe, parse_faults\n"
        f"make_probe(parse_faults('0:3:7:mid-pack:{kind}'), 0, 3)('mid-pack', 7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("SIGKILL", -signal.SIGKILL), ("SIGTERM", -signal.SIGTERM), ("SIGINT", -signal.SIGINT),
        ("OS_ABORT", -signal.SIGABRT), ("SEGFAULT", -signal.SIGSEGV), ("WORKLOAD_EXC", 1),
    ],
)  # fmt: skip
def test_each_kind_ends_a_process_as_its_name_says(kind: str, code: int) -> None:
    ended, said = hurt(kind)
    assert ended == code
    assert f"rank 3 iteration 7: injected {kind} at mid-pack, pid " in said
    assert ("InjectedFault" in said) == (kind == "WORKLOAD_EXC")


@pytest.mark.parametrize(("kind", "state"), [("SIGSTOP", psutil.STATUS_STOPPED), ("LOCK_GIL", psutil.STATUS_SLEEPING)])
def test_a_rank_can_be_held_up(kind: str, state: str) -> None:
    code = (
        "import threading, time\n"
        "from megatron_moetion.observe.fault import KINDS\n"
        "threading.Thread(target=lambda: [print(i, flush=True) or time.sleep(0.01) for i in range(10**6)]).start()\n"
        f"time.sleep(0.1); KINDS[{kind!r}]()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = psutil.Process(process.pid)
        deadline = time.monotonic() + 20
        os.set_blocking(process.stdout.fileno(), False)
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 0.5 or seen.status() != state:
            assert time.monotonic() < deadline, seen.status()
            if process.stdout.read() or seen.cpu_times().user < 0.01:
                quiet_since = time.monotonic()
            time.sleep(0.02)
        process.kill()
