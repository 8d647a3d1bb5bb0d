# SPDX-License-Identifier: Apache-2.0
"""The testbed: hosts that are really apart, links that are really slow, and nothing left behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.testbed import (  # noqa: E402
    Job,
    JobFailed,
    Testbed,
    TestbedUnavailable,
    damage,
    hosts,
    launch,
    namespaces,
    run_torchrun,
)
from benchmarks.testbed.__main__ import main, parse  # noqa: E402
from benchmarks.testbed.interrupts import Interrupts  # noqa: E402

PORT = 5000
RATE_MBIT = 80.0


@functools.cache
def why_not() -> str:
    return namespaces.why_unavailable()


@pytest.fixture
def live() -> None:
    """For tests that set up hosts."""
    if why_not():
        pytest.skip(why_not())


def on(testbed: Testbed, host: int, code: str) -> str:
    """Run Python on a host; what it printed."""
    argv = testbed.command(host, [sys.executable, "-c", textwrap.dedent(code)])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# pure


def test_a_rate_in_the_words_of_tc() -> None:
    assert hosts.rate_options(80) == "tbf rate 80000000bit burst 256kb latency 20ms".split()
    assert hosts.rate_options(0.1)[2] == "100000bit"


@pytest.mark.parametrize(("num_hosts", "rate_mbit"), [(0, None), (65, None), (2, 0.0), (2, -1.0), (2, float("nan"))])
def test_settings_out_of_range_are_refused(num_hosts: int, rate_mbit: float | None) -> None:
    with pytest.raises(ValueError, match="must be from"):
        Testbed(num_hosts, rate_mbit)


def test_a_host_outside_the_with_is_not_up() -> None:
    testbed = Testbed(2)
    with pytest.raises(RuntimeError, match="enter the testbed"):
        testbed.command(0, ["true"])
    with pytest.raises(ValueError, match="hosts 0 to 1"):
        testbed.is_up(2)


def test_names_of_namespaces_tell_a_living_owner_from_a_dead_one() -> None:
    owner = namespaces.owner_name(os.getpid())
    assert owner is not None
    assert not namespaces.is_leftover(f"{owner}h0")
    assert namespaces.is_leftover(f"moe{os.getpid()}-1sw")  # the id is in use again, by another process
    assert namespaces.is_leftover("moe4194305-77h12")  # above the largest id that Linux gives
    for foreign in ("moe", "moe12h0", f"{owner}x", "blue", "moeh0"):
        assert not namespaces.is_leftover(foreign)


def test_a_zombie_owns_nothing() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert namespaces.owner_name(child.pid) is None
    child.wait()


def test_without_root_or_tools_the_reason_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in namespaces.why_unavailable()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert "needs tc: install iproute2" in namespaces.why_unavailable()
    with pytest.raises(TestbedUnavailable, match="install iproute2"), Testbed():
        pytest.fail("entered")
    assert main(["--", "script.py"]) == TestbedUnavailable.exit_code == 2


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(1, "CAP_SYS_ADMIN"), (127, "CAP_SYS_ADMIN"), (100, "bridge"), (102, "sch_tbf"), (103, "/dev/shm")],
)
def test_each_failing_probe_is_explained(code: int, remedy: str) -> None:
    reason = namespaces.explain(code, "Operation not permitted")
    assert remedy in reason
    assert "Operation not permitted" in reason
    assert namespaces.explain(0, "") == ""


def test_command_line_of_an_agent() -> None:
    line = " ".join(launch.agent_argv(1, 3, 2, ["--max-restarts=5"]))
    assert "--nnodes 3 --node-rank 1 --nproc-per-node 2 --master-addr 10.77.0.1 --master-port" in line
    assert line.endswith("--max-restarts=5")


def test_tail_of_a_log() -> None:
    assert launch.tail("a\nb\nc", lines=2) == "  b\n  c"
    assert launch.tail("") == "  (it is empty)"


def test_flags_after_the_dashes_are_the_scripts() -> None:
    args = parse(["--hosts", "3", "--torchrun=--max-restarts=2", "--", "train.py", "--hosts", "x", "--logs"])
    assert (args.hosts, args.torchrun, args.script) == (3, "--max-restarts=2", ["train.py", "--hosts", "x", "--logs"])


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_ends_the_body_and_waits_for_the_end_of_closing(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    handler_before = signal.signal(number, signal.default_int_handler)  # so that a late one raises KeyboardInterrupt
    try:
        interrupts = Interrupts()
        interrupts.install()
        with pytest.raises(raised):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the second one does not raise
        with interrupts.close():
            os.kill(os.getpid(), number)
        steps = []
        interrupts = Interrupts()
        interrupts.install()
        with pytest.raises(KeyboardInterrupt), interrupts.close():  # noqa: PT012
            os.kill(os.getpid(), number)
            steps.append("removed")
        assert steps == ["removed"]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler_before)


# live


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_hosts_see_each_other_and_the_root_namespace_sees_none_of_it(tmp_path: Path) -> None:
    links_before = subprocess.check_output(["ip", "-br", "link"])
    with Testbed(2) as testbed:
        assert subprocess.check_output(["ip", "-br", "link"]) == links_before
        assert "10.77." not in subprocess.check_output(["ip", "route"], text=True)
        assert on(testbed, 1, "import socket; print(socket.gethostname())") == "host1"
        talk = testbed.popen(1, [sys.executable, "-c", LISTEN], tmp_path / "log")
        assert on(testbed, 0, CONNECT.format(name="host1")) == "hello from host1"
        assert on(testbed, 0, CONNECT.format(name="127.0.0.1")) == "ConnectionRefusedError"
        talk.kill()
        talk.wait()
        with pytest.raises(RuntimeError, match="already holds a testbed"), Testbed(1):
            pytest.fail("entered")
        assert testbed.is_up(1)
    assert own_namespaces() == []


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_a_link_is_as_fast_as_it_is_said_to_be() -> None:
    with Testbed(2, RATE_MBIT) as testbed:
        sent_before, received_before = (testbed.link_bytes(host)[host] for host in (0, 1))
        slow = measured_mbit(testbed, megabytes=8)
        sent, received = (testbed.link_bytes(host)[host] for host in (0, 1))
        assert 0.8 * RATE_MBIT < slow < 1.2 * RATE_MBIT
        assert 1.0 < (sent - sent_before) / 8e6 < 1.2
        assert 1.0 < (received - received_before) / 8e6 < 1.2
        testbed.set_rate(None)
        assert measured_mbit(testbed, megabytes=64) > 5 * slow
        testbed.set_rate(RATE_MBIT / 2)
        assert 0.35 < measured_mbit(testbed, megabytes=4) / slow < 0.65


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_packets_are_damaged_where_and_while_it_is_asked_for() -> None:
    if damage.why_unavailable():
        pytest.skip(damage.why_unavailable())
    with Testbed(2) as testbed:
        assert arrives_whole(testbed)
        testbed.set_damage(1, damaged_share=0.5, ports=[PORT])
        assert not arrives_whole(testbed)
        testbed.set_damage(1, damaged_share=0.5, ports=[PORT + 1])
        assert arrives_whole(testbed)
        testbed.set_damage(1, damaged_share=0.5)
        assert not arrives_whole(testbed)
        testbed.set_damage(1, lost_share=1.0)
        with pytest.raises(AssertionError, match=r"timed out|TimeoutError"):
            arrives_whole(testbed)
        testbed.set_damage(1)
        assert arrives_whole(testbed)


def test_shares_of_packets_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        damage.rules(1.5, 0.0, ())


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_memory_of_a_host_is_its_own_and_dies_with_it(tmp_path: Path) -> None:
    mine = Path("/dev/shm") / f"testbed-test-{os.getpid()}"
    listing = "import os; print(os.listdir('/dev/shm'))"
    mine.write_text("root")
    try:
        with Testbed(2, RATE_MBIT) as testbed:
            assert on(testbed, 0, listing) == "[]"
            for host in (0, 1):
                on(testbed, host, f"open('/dev/shm/state', 'w').write('of host {host}')")
            assert on(testbed, 1, "print(open('/dev/shm/state').read())") == "of host 1"
            assert not Path("/dev/shm/state").exists()
            job = testbed.popen(1, ["sleep", "600"], tmp_path / "log")
            testbed.lose(1)
            assert job.wait(10) == -signal.SIGKILL
            assert not testbed.is_up(1)
            with pytest.raises(RuntimeError, match="host 1 is not up"):
                testbed.command(1, ["true"])
            assert on(testbed, 0, "print(open('/dev/shm/state').read())") == "of host 0"
            testbed.restore(1)
            assert on(testbed, 1, listing) == "[]"
            assert 0.8 * RATE_MBIT < measured_mbit(testbed, megabytes=4) < 1.3 * RATE_MBIT
            with pytest.raises(ValueError, match="host 1 is up"):
                testbed.restore(1)
        assert mine.read_text() == "root"
    finally:
        mine.unlink()


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_a_silent_loss_is_silent_and_a_loud_one_is_not() -> None:
    for silent, expected in ((True, "TimeoutError"), (False, "closed")):
        with Testbed(2) as testbed:
            server = subprocess.Popen(testbed.command(1, [sys.executable, "-c", LISTEN]))
            waiting = subprocess.Popen(
                testbed.command(0, [sys.executable, "-c", WAIT_FOR_END]), stdout=subprocess.PIPE, text=True
            )
            assert waiting.stdout is not None
            with waiting.stdout as said:
                assert said.readline().strip() == "connected"
                testbed.lose(1, silent=silent)
                assert said.readline().strip() == expected
            waiting.wait()
            server.wait()
            testbed.restore(1)
            assert on(testbed, 0, CONNECT.format(name="host1")) == "ConnectionRefusedError"


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    handler_before = signal.getsignal(signal.SIGTERM)
    sleepers = []
    with pytest.raises(ZeroDivisionError), Testbed(2) as testbed:  # noqa: PT012
        # One whose parent is gone, as ranks of a killed agent are.
        argv = ["sh", "-c", "sleep 600 & sleep 600"]
        sleepers = [testbed.popen(host, argv, tmp_path / "log") for host in (0, 1)]
        assert len(own_namespaces()) == 3
        raise ZeroDivisionError
    assert [sleeper.wait(10) for sleeper in sleepers] == [-signal.SIGKILL] * 2
    assert own_namespaces() == []
    assert signal.getsignal(signal.SIGTERM) is handler_before


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_nothing_is_left_after_a_signal(number: signal.Signals, code: int) -> None:
    owner = OwnerProcess()
    os.killpg(owner.process.pid, number)  # as a terminal does: to the whole process group
    assert owner.process.wait(20) == code
    assert owner.namespaces() == []
    assert owner.sleeper_is_gone()


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_the_next_start_removes_what_a_killed_one_left_and_only_that() -> None:
    killed, alive = OwnerProcess(), OwnerProcess()
    try:
        killed.process.kill()
        killed.process.wait()
        assert len(killed.namespaces()) == 3
        with Testbed(1):
            assert killed.namespaces() == []
            assert killed.sleeper_is_gone()
            assert len(alive.namespaces()) == 3
            assert not alive.sleeper_is_gone()
    finally:
        alive.process.terminate()
        alive.process.wait(20)
    assert alive.namespaces() == []


@pytest.mark.dist
@pytest.mark.timeout(90)
@pytest.mark.usefixtures("live")
def test_torchrun_joins_the_hosts(tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(ALL_REDUCE)
    with Testbed(2, 200) as testbed:
        sent_before = testbed.link_bytes(1)[0]
        logs = run_torchrun(testbed, [str(script)], nproc_per_host=1, limit_s=60, folder=tmp_path)
        assert testbed.link_bytes(1)[0] - sent_before > 1_000_000  # half of the tensor at least
    assert [log.name for log in logs] == ["host0.log", "host1.log"]
    for host, log in enumerate(logs):
        assert f"rank {host} on host{host}: sum 3.0" in log.read_text()


@pytest.mark.dist
@pytest.mark.timeout(90)
@pytest.mark.usefixtures("live")
def test_a_failing_script_is_named_with_its_host_and_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no luck')\ntime.sleep(600)\n")
    with Testbed(2) as testbed, pytest.raises(JobFailed) as caught:
        run_torchrun(testbed, [str(script)], nproc_per_host=1, limit_s=60, folder=tmp_path)
    assert "host 1 ended with exit code 1; host 0 was still running" in str(caught.value)
    assert str(tmp_path / "host1.log") in str(caught.value)
    assert "no luck" in (tmp_path / "host1.log").read_text()


@pytest.mark.dist
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("live")
def test_a_job_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with Testbed(1) as testbed:
        job = Job(testbed, ["nothing.py"], nproc_per_host=1, folder=tmp_path)
        job.agents[0] = testbed.popen(0, ["sh", "-c", "echo here; sleep 600"], job.log(0))
        with pytest.raises(JobFailed, match=r"no end within 1 s: still running on host 0\n.*\n  here"):
            job.wait(1)
    assert job.agents[0].wait(10) == -signal.SIGKILL


LISTEN = f"""
import socket
server = socket.create_server(("", {PORT}))
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello from " + socket.gethostname().encode())
    connection.recv(1)
"""

_TRY = f"""
import socket, time
def connect(name):
    for _ in range(100):
        try:
            return socket.create_connection((name, {PORT}), timeout=2)
        except ConnectionRefusedError as error:
            failure = error
            time.sleep(0.02)
    raise failure
"""

CONNECT = (
    _TRY
    + """
try:
    print(connect("{name}").recv(100).decode())
except OSError as error:
    print(type(error).__name__)
"""
)

WAIT_FOR_END = (
    _TRY
    + """
connection = connect("host1")
connection.recv(100)
print("connected", flush=True)
try:
    print("closed" if connection.recv(1) == b"" else "data", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""
)

RECEIVE = """
import socket, sys, time
server = socket.create_server(("", {port}))
print("listening", flush=True)
connection, _ = server.accept()
started, count = time.perf_counter(), 0
while block := connection.recv(1 << 20):
    count += len(block)
print(count * 8e-6 / (time.perf_counter() - started))
"""

SEND = """
import socket
connection = socket.create_connection(("host1", {port}))
block = bytes(1_000_000)
for _ in range({megabytes}):
    connection.sendall(block)
"""

ALL_REDUCE = """
import os, socket, torch
from torch import distributed as dist
dist.init_process_group("gloo")
tensor = torch.full((500_000,), 1.0 + dist.get_rank())
dist.all_reduce(tensor)
print(f"rank {dist.get_rank()} on {socket.gethostname()}: sum {tensor[7].item()}")
dist.destroy_process_group()
"""

HOLD = """
import time
from pathlib import Path
from benchmarks.testbed import Testbed
with Testbed(2) as testbed:
    print(testbed.popen(0, ["sleep", "600"], Path("/dev/null")).pid, flush=True)
    time.sleep(600)
"""


WHOLE = """
import socket
server = socket.create_server(("", {port}))
print("listening", flush=True)
server.settimeout(4)
connection, _ = server.accept()
found = b""
while block := connection.recv(1 << 20):
    found += block
print(found == bytes({size}))
"""

SEND_ZEROS = """
import socket
socket.create_connection(("host1", {port}), timeout=2).sendall(bytes({size}))
"""


def arrives_whole(testbed: Testbed, size: int = 4_000_000) -> bool:
    """Whether zeros that host 0 sends to host 1 are zeros there."""
    argv = testbed.command(1, [sys.executable, "-c", WHOLE.format(port=PORT, size=size)])
    receiver = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert receiver.stdout is not None
    with receiver.stdout as said:
        try:
            assert said.readline().strip() == "listening"
            on(testbed, 0, SEND_ZEROS.format(port=PORT, size=size))
            return said.readline().strip() == "True"
        finally:
            receiver.wait(20)


def own_namespaces() -> list[str]:
    return namespaces.existing(namespaces.owner_name(os.getpid()))


def measured_mbit(testbed: Testbed, megabytes: int) -> float:
    """Rate at which host 1 receives from host 0, payload only."""
    receiver = subprocess.Popen(
        testbed.command(1, [sys.executable, "-c", RECEIVE.format(port=PORT)]), stdout=subprocess.PIPE, text=True
    )
    assert receiver.stdout is not None
    with receiver.stdout as said:
        assert said.readline().strip() == "listening"
        on(testbed, 0, SEND.format(port=PORT, megabytes=megabytes))
        rate = float(said.readline())
    receiver.wait(10)
    return rate


def _heed_signals() -> None:
    """A suite that runs in the background, or under nohup, hands ignored signals down to its children."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class OwnerProcess:
    """Another process that holds a testbed with two hosts."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )
        assert self.process.stdout is not None
        with self.process.stdout as said:
            self.sleeper = int(said.readline())
        self.owner = namespaces.owner_name(self.process.pid)

    def namespaces(self) -> list[str]:
        assert self.owner is not None
        return namespaces.existing(self.owner)

    def sleeper_is_gone(self) -> bool:
        """Gone, or a zombie that waits for whatever reaps orphans here."""
        return namespaces.owner_name(self.sleeper) is None
