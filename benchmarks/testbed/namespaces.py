# SPDX-License-Identifier: Apache-2.0
"""Network namespaces that carry their owner's name, and what must be there before one is made.

An owner is a process. Its namespaces are named ``moe<pid>-<start>h0``, ``...h1`` and so on (hosts) and
``moe<pid>-<start>sw`` (the switch). ``start`` is the owner's start time in clock ticks since boot: a process that gets
the id of a dead owner later is not taken for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

COMMAND_LIMIT_S = 30.0
END_LIMIT_S = 10.0
POLL_INTERVAL_S = 0.01

_NAME = re.compile(r"(moe(\d+)-\d+)(?:h\d+|sw)")

_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

# All in namespaces without a name, which end with the shell that made them.
_PROBES = (
    ("a bridge cannot be made", "ip link add br0 type bridge", "load its module: modprobe bridge"),
    ("a veth pair cannot be made", "ip link add v0 type veth peer name v1", "load its module: modprobe veth"),
    (
        "a link's rate cannot be limited",
        "tc qdisc add dev v0 root tbf rate 1mbit burst 256kb latency 20ms",
        "load its module: modprobe sch_tbf",
    ),
    (
        "/dev/shm cannot be made private",
        "mount -t tmpfs probe /dev/shm",
        "allow mounts: a container needs --privileged",
    ),
)
_FIRST_PROBE_CODE = 100


class TestbedUnavailable(RuntimeError):
    """This machine cannot emulate hosts. The message says why and what to do; nothing has been changed."""

    __test__ = False  # not a test, whatever pytest thinks of the name
    exit_code = 2


def why_unavailable() -> str:
    """Why no testbed can be set up here, with the remedy; empty if one can. Changes nothing."""
    if not hasattr(os, "geteuid") or not Path("/proc/self/ns/net").exists():
        return "the testbed is made of Linux namespaces, and this is no Linux with /proc: run it on Linux"
    if os.geteuid() != 0:
        return f"the testbed makes network namespaces, which needs root, and this is user {os.geteuid()}: use sudo"
    missing = [tool for tool in _PACKAGES if shutil.which(tool) is None]
    if missing:
        packages = sorted({_PACKAGES[tool] for tool in missing})
        return f"the testbed needs {', '.join(missing)}: install {' and '.join(packages)} (apt-get install ...)"
    steps = "\n".join(f"{step} || exit {_FIRST_PROBE_CODE + i}" for i, (_, step, _) in enumerate(_PROBES))
    probe = ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", steps]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    return explain(done.returncode, done.stderr.strip())


def explain(code: int, said: str) -> str:
    """What the exit code of the probe means. ``said`` is what the failing tool wrote."""
    if code == 0:
        return ""
    if 0 <= code - _FIRST_PROBE_CODE < len(_PROBES):
        fault, _, remedy = _PROBES[code - _FIRST_PROBE_CODE]
    else:
        fault, remedy = "namespaces cannot be made", "allow CAP_SYS_ADMIN and CAP_NET_ADMIN (docker run --privileged)"
    return f"{fault} ({said}): {remedy}"


def call(*argv: str) -> str:
    """Run a tool; its output. ``RuntimeError`` with what it wrote if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def owner_name(pid: int) -> str | None:
    """What the names of this process's namespaces start with; None if it does not run (a zombie does not)."""
    try:
        # The command's name, in parentheses, may hold anything; the fields after it are numbers and one letter.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else f"moe{pid}-{fields[19]}"


def existing(owner: str | None = None) -> list[str]:
    """Names of the testbed namespaces on this machine: of this owner, or of all."""
    names = [line.split()[0] for line in call("ip", "netns", "list").splitlines() if line.strip()]
    matches = [match for match in map(_NAME.fullmatch, names) if match is not None]
    return [match[0] for match in matches if owner in (None, match[1])]


def is_leftover(name: str) -> bool:
    """Whether this is a testbed's namespace whose owner is gone."""
    match = _NAME.fullmatch(name)
    return match is not None and owner_name(int(match[2])) != match[1]


def remove_leftovers() -> list[str]:
    """Remove what testbeds left behind whose owner was killed, with all processes in it; the names."""
    names = [name for name in existing() if is_leftover(name)]
    for name in names:
        remove(name)
    return names


def end_processes(name: str) -> None:
    """SIGKILL to all processes in this namespace, until there are none."""
    deadline = time.monotonic() + END_LIMIT_S
    while pids := call("ip", "netns", "pids", name).split():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"processes {', '.join(pids)} in namespace {name} are still there {END_LIMIT_S:g} s after SIGKILL; "
                f"when they have ended, remove it with: ip netns del {name}"
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(POLL_INTERVAL_S)


def remove(name: str) -> None:
    """End all processes of a namespace and delete it, links included. Fine if another process is faster."""
    try:
        end_processes(name)
        call("ip", "netns", "del", name)
    except RuntimeError:
        if name in existing():
            raise
