# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_moetion.megatron_lm`` on the CPU: the first argument is a file for losses, then as there.

Of Megatron's functions only ``training_log`` is replaced here, to write down every bit of every loss.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from official_pretrain import redirect

from megatron_moetion.megatron_lm.__main__ import run
from megatron_moetion.pretrain.launch import lead


def note_losses(path: Path, then: Callable[[int], None] = lambda iteration: None) -> None:
    """``then`` is called with each iteration, on every rank, before Megatron saves or decides to leave."""
    from megatron.training import training

    original = training.training_log

    def training_log(losses: dict[str, Any], total: Any, rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if losses:
            with path.open("a") as out:
                out.write(json.dumps({"iteration": iteration, "loss": float(losses["lm loss"]).hex()}) + "\n")
        then(iteration)
        return original(losses, total, rate, iteration, *args, **kwargs)

    training.training_log = training_log


def save_at_once() -> None:
    """Megatron's first save starts a process that imports all of it once more, and stays where this one is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL))  # PR_SET_PDEATHSIG
    filesystem_async._results_queue = manager.Queue()


if __name__ == "__main__":
    redirect()
    save_at_once()
    note_losses(Path(sys.argv[1]))
    lead(partial(run, sys.argv[2:]))
