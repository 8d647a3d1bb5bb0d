# SPDX-License-Identifier: Apache-2.0
"""A launcher of warm parents, whose ranks do as they are told: ``FOLDER JSON``; prints the parents' exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
from torch import distributed as dist

from megatron_moetion.config import STANDBY
from megatron_moetion.warm.launch import Launch
from megatron_moetion.warm.stay import stay
from megatron_moetion.warm.waiting import await_job

LIMIT_S = 80.0
SIGNALLED = "signalled"


def fork(act: Callable[[], int]) -> int:
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = act()
        finally:
            os._exit(code)
    return pid


def host_store(note: Path) -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    note.with_suffix(".tmp").write_text(str(store.port))
    note.with_suffix(".tmp").rename(note)
    time.sleep(LIMIT_S)
    return 0


def rank(folder: Path, acts: dict[str, str]) -> NoReturn:
    """As the act of this generation says: ``kill``, ``wait``, ``exit CODE`` once all have noted, ``end`` at once.

    What is ``late`` comes when the signals that wait for nothing have been sent.
    """
    generation, number = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    act = acts.get(f"{generation}:{number}", acts.get(generation, "end"))
    if act == "exit when told":
        fork(lambda: helper(folder))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    if act == "end when told":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if act == "note and end":
        signal.signal(signal.SIGUSR1, lambda *_: ((folder / "noted").touch(), os._exit(0)))
    (folder / f"{generation}.{number}").write_text(str(os.getpid()))
    while len(list(folder.glob(f"{generation}.?"))) < 3:
        time.sleep(0.01)
    match act.split():
        case ["lose"]:  # the machine, with its parent
            os.kill(os.getppid(), signal.SIGKILL)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["exit", code]:
            os._exit(int(code))
        case ["late", "exit", code]:
            while not (folder / SIGNALLED).exists():
                time.sleep(0.01)
            time.sleep(2)
            os._exit(int(code))
        case ["end"]:
            os._exit(0)
    time.sleep(LIMIT_S)
    os._exit(71)


def helper(folder: Path) -> int:
    """A process that the rank has started: a writer of checkpoints, for instance."""

    def note(*_: object) -> None:
        (folder / "told").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, note)
    time.sleep(LIMIT_S)
    return 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(settings: dict[str, Any]) -> Launch:
    """Of three machines with a rank each."""
    here = Launch.here(settings["limit"], timedelta(seconds=20))
    return replace(here, meet_s=settings["meet_s"], answer_s=2.0)


def parent(folder: Path, settings: dict[str, Any], number: int, port: int) -> int:
    environ = {
        "RANK": str(number), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"node{number}", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": str(settings["launcher_has_store"]),
    }  # fmt: skip
    os.environ.update(environ)
    if settings.get("standbys"):
        os.environ["MOETION_RENDEZVOUS"] = f"127.0.0.1:{port}"
    return stay(lambda: rank(folder, settings["acts"]), launch(settings))


def standby(folder: Path, settings: dict[str, Any], number: int, port: int) -> int:
    os.environ.update({"MOETION_RENDEZVOUS": f"127.0.0.1:{port}", "SLURMD_NODENAME": f"spare{number}"})
    os.environ[STANDBY] = str(folder / f"standby{number}")
    with said_by(folder, number).open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
    await_job(os.environ)
    return stay(lambda: rank(folder, settings["acts"]), launch(settings))


def said_by(folder: Path, standby: int) -> Path:
    return folder / f"standby{standby}.said"


def listener(parent: int) -> int:
    """The younger child."""
    return max(child.pid for child in psutil.Process(parent).children())


def await_ready(folder: Path, standbys: int) -> None:
    """Ranks have begun, and standbys stand by."""
    while len(list(folder.glob("0.?"))) < 3:
        time.sleep(0.01)
    said = [said_by(folder, number) for number in range(standbys)]
    while not all(path.exists() and "stands by" in path.read_text() for path in said):
        time.sleep(0.01)


def main(folder: Path, settings: dict[str, Any]) -> None:
    store, port = 0, free_port()
    if settings["launcher_has_store"]:
        store = fork(lambda: host_store(folder / "port"))
        while not (folder / "port").exists():
            time.sleep(0.01)
        port = int((folder / "port").read_text())
    parents = [fork(lambda number=number: parent(folder, settings, number, port)) for number in range(3)]
    standbys, late = settings.get("standbys", 0), 0
    parents += [fork(lambda number=number: standby(folder, settings, number, port)) for number in range(standbys)]
    for name, who, *noted in settings.get("signals", []):
        await_ready(folder, standbys)
        if noted:
            (folder / SIGNALLED).touch()
        while not all((folder / note).exists() for note in noted):
            time.sleep(0.01)
        time.sleep(0.3)
        match who:
            case "listener of 1":
                late = late or listener(parents[1])
                pids = [late]
            case "listeners":
                pids = [listener(pid) for pid in parents[:3]]
            case "store":
                pids = [store]
            case number:
                pids = [parents[number]]
        for pid in pids:
            os.kill(pid, signal.Signals[name])
    (folder / SIGNALLED).touch()
    began = time.monotonic()
    codes: dict[int, int] = {}
    while len(codes) < len(parents) and time.monotonic() - began < LIMIT_S:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in parents:
            codes[parents.index(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in [*([store] if store else []), *(p for n, p in enumerate(parents) if n not in codes)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for number in range(standbys):
        print(said_by(folder, number).read_text(), end="")
    print(
        json.dumps(
            {
                "codes": [codes.get(n) for n in range(len(parents))],
                "first": next(iter(codes), None),
                "seconds": time.monotonic() - began,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
