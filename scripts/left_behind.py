# SPDX-License-Identifier: Apache-2.0
"""What a script must not leave behind: processes that it started, and memory that they took."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

PATIENCE_S = 3.0
"""For a command that was asked to end."""


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command to end, then kill it and its descendants.

    The ranks of ``torchrun`` have sessions of their own: they are found as its descendants while it lives.
    """
    if process.poll() is not None:
        return
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(process.pid)
        processes = [agent, *agent.children(recursive=True)]
        agent.terminate()
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


@contextlib.contextmanager
def temporary_store(parent: Path, purpose: str) -> Iterator[Path]:
    """A folder for arenas in ``parent``; gone afterwards, however the runs end.

    Removes those of the same purpose whose process was killed.
    """
    prefix = f"moetion-{purpose}-{os.getuid()}-"
    for leftover in parent.glob(prefix + "*"):
        owner = leftover.name[len(prefix) :].split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)
    store = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield store
    finally:
        shutil.rmtree(store, ignore_errors=True)
