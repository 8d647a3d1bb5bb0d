# SPDX-License-Identifier: Apache-2.0
"""The end of a command and of all that it started."""

from __future__ import annotations

import contextlib
import subprocess

import psutil

PATIENCE_S = 3.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command to end, then kill it and its descendants after 3 seconds.

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
