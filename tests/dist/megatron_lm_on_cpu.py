# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_moetion.megatron_lm`` on the CPU: the first argument is a file for losses, then as there.

Of Megatron's functions only ``training_log`` is replaced here, to write down every bit of every loss. With ``ASIDE``
in the environment data loaders leave the generator alone that dropout draws from, as on a GPU, where that is another
one: Megatron loads random states before it builds loaders.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from official_pretrain import redirect

from megatron_moetion.ending import lead
from megatron_moetion.megatron_lm.__main__ import run

ASIDE = "LOADERS_DRAW_ASIDE"


def note_losses(path: Path, then: Callable[[int], None] = lambda iteration: None) -> None:
    """``then`` is called with each iteration, on every rank, before Megatron saves or decides to leave."""
    from megatron.training import training

    original = training.training_log

    def training_log(losses: dict[str, Any], total: Any, rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if losses:
            note = {"iteration": iteration, "loss": float(losses["lm loss"]).hex(), "time": time.time()}
            note["attempt"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            with path.open("a") as out:
                out.write(json.dumps(note) + "\n")
        then(iteration)
        return original(losses, total, rate, iteration, *args, **kwargs)

    training.training_log = training_log


def draw_aside() -> None:
    """Whoever makes an iterator of a data loader finds torch's generator as it was."""
    from torch.utils.data import DataLoader

    original = DataLoader.__iter__

    def iterate(self: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return original(self)

    DataLoader.__iter__ = iterate


def save_at_once() -> None:
    """Megatron's first save starts a process that imports all of it once more, and stays where this one is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL))  # PR_SET_PDEATHSIG
    filesystem_async._results_queue = manager.Queue()


if __name__ == "__main__":
    redirect()
    if ASIDE in os.environ:
        draw_aside()
    save_at_once()
    note_losses(Path(sys.argv[1]))
    lead(partial(run, sys.argv[2:]))
