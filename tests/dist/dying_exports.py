# SPDX-License-Identifier: Apache-2.0
"""Exports of one run that end by SIGKILL, each in another place, and one without room on the disk.

Called with the folder to write to and a store. Each export is a fork of this process, which imports once; how it ended
is a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_moetion.mcore import cpu_device

cpu_device.install()

# isort: split
from megatron_moetion.errors import StoreError
from megatron_moetion.export import export as module
from megatron_moetion.inspect.look import node_folders
from megatron_moetion.mcore import torch_dist
from megatron_moetion.persist import tracker

SMALL = 64 << 10
"""Bytes that a file may have where there is no room."""
PHASES: dict[str, tuple[Any, str, int]] = {
    "before files": (module, "write_rank", 0),
    "behind two ranks": (module, "write_rank", 2),
    "before names of tensors": (module, "finish", 0),
    "among names of tensors": (torch_dist, "save_config", 0),
    "before the folder's name": (tracker, "publish", 0),
    "before the tracker file": (tracker, "write_tracker", 0),
}
"""Of what is called, and how many calls of it return."""


def main(output: Path, store: Path) -> None:
    """Each phase in turn, into the same folder."""
    for phase, (owner, name, times) in PHASES.items():
        say(phase, fork(lambda o=owner, n=name, t=times: die_in(o, n, t), output, store))
    say("no room", fork(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL)), output, store))


def fork(prepare: Callable[[], None], output: Path, store: Path) -> int:
    """One export; its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        prepare()
        folders = node_folders([store], "restarts")
        module.export(folders, "restarts", output, lambda line: None, force=True)
        code = 0
    except StoreError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.exit_code
    finally:
        os._exit(code)


def die_in(owner: Any, name: str, times: int) -> None:
    """The process ends in the call after that many."""
    original, left = getattr(owner, name), [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args, **kwargs)

    setattr(owner, name, call)


def say(phase: str, code: int) -> None:
    """One line."""
    output = Path(sys.argv[1])
    print(json.dumps({"phase": phase, "code": code, "there": sorted(p.name for p in output.iterdir())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
